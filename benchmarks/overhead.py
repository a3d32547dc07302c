"""Share of a PPO step in which no role is at work: `python -m benchmarks.overhead CONFIG [KEY=VALUE ...]`.

It runs the config from its start and reads the run's own metrics: `time/uncovered_s` ÷ `time/step_s`, mean over the
steps without the first. As a check, the same share from the trace of all actors, between the first weight sync and the
last, which also counts what happens between steps: logging, samples, completing a checkpoint.
"""

import typer

from benchmarks.common import ConfigArgument, Findings, FreshProcess, Measure, OverridesArgument, run_benchmark
from benchmarks.runs import PHASES, load_ppo, measured_run


def main(config: ConfigArgument, overrides: OverridesArgument = None) -> Findings:
    """Share of a PPO step in which no role is at work."""
    load_ppo(config, overrides or ())
    with FreshProcess() as process:
        run = process.call(measured_run, config, overrides or ())
    shares = [row["time/uncovered_s"] / row["time/step_s"] for row in run.rows]
    typer.echo("\n  step  seconds  no role at work")
    for row, share in zip(run.rows, shares, strict=True):
        typer.echo(f"  {row['step']:4.0f}  {row['time/step_s']:7.2f}  {share:15.2%}")
    typer.echo()
    measures = [
        Measure("step time not covered by any role's work", 100 * sum(shares) / len(shares), "%", asked="at most 5 %"),
        Measure("step", run.mean("time/step_s"), "s"),
        *(Measure(phase.replace("_", " "), run.mean(f"time/{phase}_s"), "s") for phase in PHASES),
        Measure("steps counted", len(run.rows)),
    ]
    if run.idle is not None:
        measures.append(Measure("the same from the trace, between steps too", 100 * run.idle, "%"))
    return {config.name: measures}


if __name__ == "__main__":
    run_benchmark(main)
