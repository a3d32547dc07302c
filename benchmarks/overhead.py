"""Share of a PPO step in which no role is at work: `python -m benchmarks.overhead CONFIG [KEY=VALUE ...]`.

It runs the config from its start and reads the run's own metrics: `time/uncovered_s` ÷ `time/step_s`, mean over the
steps without the first. As a check, the same share from the trace of all actors, between the first weight sync and the
last, which also counts what happens between steps: logging, samples, completing a checkpoint.
"""

import typer

from benchmarks.common import (
    RESULTS,
    ConfigArgument,
    FreshProcess,
    Machine,
    Measure,
    OverridesArgument,
    ResultsOption,
    report,
    run_command,
)
from benchmarks.runs import PHASES, load_ppo, measured_run


def main(config: ConfigArgument, overrides: OverridesArgument = None, results: ResultsOption = RESULTS) -> None:
    """Share of a PPO step in which no role is at work."""
    arguments, machine = dict(locals()), Machine.here()
    load_ppo(config, overrides or ())
    with FreshProcess({}) as process:
        run = process.call(measured_run, config, overrides or ())
    shares = [row["time/uncovered_s"] / row["time/step_s"] for row in run.rows]
    typer.echo("\n  step  seconds  no role at work")
    for row, share in zip(run.rows, shares, strict=True):
        typer.echo(f"  {row['step']:4.0f}  {row['time/step_s']:7.2f}  {share:15.2%}")
    typer.echo()
    measures = [
        Measure(
            name="step time not covered by any role's work",
            value=100 * sum(shares) / len(shares),
            unit="%",
            asked="at most 5 %",
        ),
        Measure(name="step", value=run.mean("time/step_s"), unit="s"),
        *(Measure(name=phase.replace("_", " "), value=run.mean(f"time/{phase}_s"), unit="s") for phase in PHASES),
        Measure(name="steps counted", value=len(run.rows)),
    ]
    if run.idle is not None:
        measures.append(Measure(name="the same from the trace, between steps too", value=100 * run.idle, unit="%"))
    report("overhead", config.name, arguments, measures, machine, results)


if __name__ == "__main__":
    run_command(main)
