"""What the controller costs as samples and actors grow: `python -m benchmarks.scale`.

The controller, its run folder, the actors and all that travels between them are real. Models are not there: their
actors sleep for as long as the work would take on GPUs (`benchmarks/simulation`). One sweep goes over samples, the
other over actors. Counted are the CPU seconds of the controller's process in a step, as a share of the step's time on
GPUs. The sweeps cut the sleeps short, which changes nothing in that; a last run keeps to their length, and counts the
time in which no role is at work.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import ROOT, Findings, FreshProcess, Measure, run_benchmark
from benchmarks.simulation.plot import plot
from benchmarks.simulation.run import RANKED, Cost, Setup, measure_all, measure_at_pace

BOUND = 0.02
PICTURE = ROOT / "docs" / "scale.png"


def main(
    max_samples: Annotated[int, typer.Option(min=512, help="Most samples in a step.")] = 65536,
    max_ranks: Annotated[int, typer.Option(min=64, help="Most ranks, of four roles together.")] = 128,
    max_engines: Annotated[int, typer.Option(min=16, help="Most rollout engines.")] = 64,
    picture: Annotated[Path, typer.Option(metavar="PNG", help="Where the picture goes.")] = PICTURE,
) -> Findings:
    """Controller's time and memory in a step against the number of samples and of actors."""
    ranks = max_ranks // len(RANKED)
    by_samples = [Setup(max_samples // part, ranks // 4, max_engines // 2) for part in (64, 16, 4, 1)]
    by_actors = [Setup(max_samples // 4, ranks // part, max_engines // part) for part in (16, 4, 2, 1)]
    # Each in a process of its own: the most actors and the most samples don't fit into one machine's memory together.
    with FreshProcess() as process:
        at_pace = process.call(measure_at_pace, by_samples[0])
    with FreshProcess() as process:
        samples = process.call(measure_all, by_samples)
    with FreshProcess() as process:
        actors = process.call(measure_all, by_actors)
    plot(samples, actors, BOUND, picture)
    return {
        f"more samples, {by_samples[0].actors} actors": _sweep(samples, [s.samples for s in by_samples], "samples"),
        f"more actors, {by_actors[0].samples:,} samples": _sweep(actors, [s.actors for s in by_actors], "actors"),
        str(by_samples[0]): _uncovered(at_pace),
    }


def _sweep(costs: Sequence[Cost], sizes: Sequence[int], what: str) -> list[Measure]:
    growth = (costs[-1].cpu_s / costs[0].cpu_s) / (sizes[-1] / sizes[0])
    measures = [
        Measure(
            "controller's CPU time ÷ a step's time, at most",
            100 * max(cost.cpu_s / cost.setup.step.seconds for cost in costs),
            "%",
            asked=f"at most {100 * BOUND:g} %",
        ),
        Measure(f"its growth ÷ growth of the {what}", growth, asked="at most 1"),
    ]
    for cost in costs:
        at = str(cost.setup)
        measures += [
            Measure(f"{at}: a step's time", cost.setup.step.seconds, "s"),
            Measure(f"{at}: controller's CPU time", cost.cpu_s, "s"),
            Measure(f"{at}: of which its own thread", cost.thread_s, "s"),
            Measure(f"{at}: controller's memory", cost.bytes / 1e6, "MB"),
        ]
    return measures


def _uncovered(cost: Cost) -> list[Measure]:
    step, idle = cost.row["time/step_s"], cost.row["time/uncovered_s"]
    return [
        Measure("step time not covered by any role's work", 100 * idle / step, "%", asked=f"at most {100 * BOUND:g} %"),
        Measure("step", step, "s"),
        Measure("the least that it can take", cost.setup.step.seconds, "s"),
    ]


if __name__ == "__main__":
    run_benchmark(main)
