"""What `run.deterministic` costs: `python -m benchmarks.determinism CONFIG [KEY=VALUE ...]`.

It runs the config with and without it, in turns, each time from its start in a process of its own, and compares the
median time of a step, without the first of each run.
"""

from statistics import median

from benchmarks.common import ConfigArgument, Findings, Measure, OverridesArgument, RoundsOption, run_benchmark
from benchmarks.runs import by_phase, load_ppo, phase_seconds, runs_in_turns


def main(config: ConfigArgument, overrides: OverridesArgument = None, rounds: RoundsOption = 2) -> Findings:
    """Steps/s with `run.deterministic`, as a share of those without."""
    load_ppo(config, overrides or ())
    settings = {
        name: [*(overrides or ()), f"run.deterministic={value}"]
        for name, value in (("deterministic", "true"), ("free", "false"))
    }
    runs = runs_in_turns(config, settings, rounds)
    bound, free = (1 / median(phase_seconds(each, "step")) for each in runs.values())
    return {
        config.name: [
            Measure("steps/s with run.deterministic ÷ without", bound / free),
            Measure("with run.deterministic", bound, "steps/s"),
            Measure("without", free, "steps/s"),
            *by_phase(runs, ("generate", "score", "critic_update")),
        ]
    }


if __name__ == "__main__":
    run_benchmark(main)
