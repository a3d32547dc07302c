"""What `run.deterministic` costs: `python -m benchmarks.determinism CONFIG [KEY=VALUE ...]`.

It runs the config with and without it, in turns, each time from its start in a process of its own, and compares the
median time of a step, without the first of each run.
"""

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


def main(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    rounds: RoundsOption = 2,
    results: ResultsOption = RESULTS,
) -> None:
    """Steps/s with `run.deterministic`, as a share of those without."""
    arguments, machine = dict(locals()), Machine.here()
    load_ppo(config, overrides or ())
    settings = {
        name: [*(overrides or ()), f"run.deterministic={value}"]
        for name, value in (("free", "false"), ("deterministic", "true"))
    }
    runs = runs_in_turns(config, settings, rounds)

    def seconds(name: str, phase: str) -> list[float]:
        return phase_seconds(runs[name], phase)

    free, bound = (1 / median(seconds(name, "step")) for name in ("free", "deterministic"))
    report(
        "determinism",
        config.name,
        arguments,
        [
            Measure(name="steps/s with run.deterministic ÷ without", value=bound / free),
            Measure(name="with run.deterministic", value=bound, unit="steps/s"),
            Measure(name="without", value=free, unit="steps/s"),
            *(
                Measure(name=f"{phase}, {name}", value=median(seconds(name, phase)), unit="s")
                for phase in ("generate", "score", "critic_update")
                for name in ("deterministic", "free")
            ),
            spread(seconds("free", "step"), seconds("deterministic", "step")),
        ],
        machine,
        results,
    )


if __name__ == "__main__":
    run_command(main)
