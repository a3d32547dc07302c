"""What a step costs without a critic: `python -m benchmarks.grpo_step CONFIG [KEY=VALUE ...]`.

It runs a PPO config as it is, and with GRPO on as many samples (four of each prompt), in turns, each time from its
start in a process of its own, and compares the median time of a step, without the first of each run. The reward models
of the second sit with the policy, as they do by default where there is no critic.
"""

import json
from statistics import median

from benchmarks.common import (
    RESULTS,
    ConfigArgument,
    FreshProcess,
    Machine,
    Measure,
    OverridesArgument,
    ResultsOption,
    RoundsOption,
    report,
    run_command,
    say,
    spread,
)
from benchmarks.runs import MeasuredRun, load_ppo, measured_run
from rlhf_ray.config.jobs import PPOJob

_SAMPLES_OF_A_PROMPT = 4


def main(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    rounds: RoundsOption = 2,
    results: ResultsOption = RESULTS,
) -> None:
    """One GRPO step ÷ one PPO step."""
    arguments, machine = dict(locals()), Machine.here()
    settings = {"ppo": list(overrides or ()), "grpo": []}
    settings["grpo"] = [*settings["ppo"], *_as_grpo(load_ppo(config, settings["ppo"]))]
    runs: dict[str, list[MeasuredRun]] = {"ppo": [], "grpo": []}
    for number in range(rounds):
        for algorithm in ("ppo", "grpo") if number % 2 == 0 else ("grpo", "ppo"):
            with FreshProcess({}) as process:
                run = process.call(measured_run, config, settings[algorithm])
            runs[algorithm].append(run)
            say(f"round {number + 1}/{rounds}, {algorithm}: {run.mean('time/step_s'):.2f} s a step")

    def seconds(algorithm: str, phase: str) -> list[float]:
        return [row[f"time/{phase}_s"] for run in runs[algorithm] for row in run.rows if f"time/{phase}_s" in row]

    grpo, ppo = median(seconds("grpo", "step")), median(seconds("ppo", "step"))
    report(
        "grpo_step",
        config.name,
        arguments,
        [
            Measure(name="one GRPO step ÷ one PPO step", value=grpo / ppo),
            Measure(name="GRPO", value=grpo, unit="s"),
            Measure(name="PPO", value=ppo, unit="s"),
            *(
                Measure(name=f"{phase}, {name}", value=median(seconds(algorithm, phase)), unit="s")
                for phase in ("generate", "score", "policy_update")
                for algorithm, name in (("grpo", "GRPO"), ("ppo", "PPO"))
            ),
            spread(seconds("grpo", "step"), seconds("ppo", "step")),
        ],
        machine,
        results,
    )


def _as_grpo(job: PPOJob) -> list[str]:
    """Overrides that make a PPO job one of GRPO with as many samples."""
    kl = json.dumps(job.algorithm.kl.model_dump(mode="json"))
    return [
        f"algorithm={{advantage: grpo, kl: {kl}}}",
        "critic=null",
        "placement.critic={}",
        "placement.reward={colocate: policy}",
        f"data.samples_per_prompt={_SAMPLES_OF_A_PROMPT}",
        f"data.prompts_per_step={job.samples_per_step // _SAMPLES_OF_A_PROMPT}",
    ]


if __name__ == "__main__":
    run_command(main)
