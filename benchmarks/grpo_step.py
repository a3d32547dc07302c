"""What a step costs without a critic: `python -m benchmarks.grpo_step CONFIG [KEY=VALUE ...]`.

It runs a PPO config as it is, and with GRPO on as many samples (four of each prompt), in turns, each time from its
start in a process of its own, and compares the median time of a step, without the first of each run. The reward models
of the second sit with the policy, as they do by default where there is no critic.
"""

import json
from statistics import median

from benchmarks.common import ConfigArgument, Findings, Measure, OverridesArgument, RoundsOption, run_benchmark
from benchmarks.runs import by_phase, load_ppo, phase_seconds, runs_in_turns
from rlhf_ray.config.jobs import PPOJob

_SAMPLES_OF_A_PROMPT = 4


def main(config: ConfigArgument, overrides: OverridesArgument = None, rounds: RoundsOption = 2) -> Findings:
    """One GRPO step ÷ one PPO step."""
    as_ppo = list(overrides or ())
    as_grpo = [*as_ppo, *_as_grpo(load_ppo(config, as_ppo))]
    runs = runs_in_turns(config, {"GRPO": as_grpo, "PPO": as_ppo}, rounds)
    grpo, ppo = (median(phase_seconds(each, "step")) for each in runs.values())
    return {
        config.name: [
            Measure("one GRPO step ÷ one PPO step", grpo / ppo),
            Measure("GRPO", grpo, "s"),
            Measure("PPO", ppo, "s"),
            *by_phase(runs, ("generate", "score", "policy_update")),
        ]
    }


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
    run_benchmark(main)
