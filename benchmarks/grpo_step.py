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
    Machine,
    Measure,
    OverridesArgument,
    ResultsOption,
    RoundsOption,
    report,
    run_command,
    spread,
)
from benchmarks.runs import load_ppo, phase_seconds, runs_in_turns
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
    runs = runs_in_turns(config, settings, rounds)

    def seconds(algorithm: str, phase: str) -> list[float]:
        return phase_seconds(runs[algorithm], phase)

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
