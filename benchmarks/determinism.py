"""What `run.deterministic` costs: `python -m benchmarks.determinism CONFIG [KEY=VALUE ...]`.

It runs the config with and without it, in turns, each time from its start in a process of its own, and compares the
median time of a step, without the first of each run.
"""

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


def main(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    rounds: RoundsOption = 2,
    results: ResultsOption = RESULTS,
) -> None:
    """Steps/s with `run.deterministic`, as a share of those without."""
    arguments, machine = dict(locals()), Machine.here()
    load_ppo(config, overrides or ())
    runs: dict[bool, list[MeasuredRun]] = {False: [], True: []}
    for number in range(rounds):
        for deterministic in (False, True) if number % 2 == 0 else (True, False):
            with FreshProcess({}) as process:
                setting = f"run.deterministic={str(deterministic).lower()}"
                run = process.call(measured_run, config, [*(overrides or ()), setting])
            runs[deterministic].append(run)
            say(f"round {number + 1}/{rounds}, {setting}: {run.mean('time/step_s'):.2f} s a step")

    def seconds(deterministic: bool, phase: str) -> list[float]:
        return [row[f"time/{phase}_s"] for run in runs[deterministic] for row in run.rows if f"time/{phase}_s" in row]

    free, bound = (1 / median(seconds(deterministic, "step")) for deterministic in (False, True))
    report(
        "determinism",
        config.name,
        arguments,
        [
            Measure(name="steps/s with run.deterministic ÷ without", value=bound / free),
            Measure(name="with run.deterministic", value=bound, unit="steps/s"),
            Measure(name="without", value=free, unit="steps/s"),
            *(
                Measure(name=f"{phase}, {name}", value=median(seconds(deterministic, phase)), unit="s")
                for phase in ("generate", "score", "critic_update")
                for deterministic, name in ((True, "deterministic"), (False, "free"))
            ),
            spread(seconds(False, "step"), seconds(True, "step")),
        ],
        machine,
        results,
    )


if __name__ == "__main__":
    run_command(main)
