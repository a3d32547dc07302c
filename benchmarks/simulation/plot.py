"""The picture of what the controller costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.simulation.run import Cost
from rlhf_ray.telemetry.plots import COLOURS, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(by_samples: Sequence[Cost], by_actors: Sequence[Cost], bound: float, path: Path) -> None:
    """Draw seconds and memory against samples and against actors.

    Args:
        bound: share of a real step that the controller may take.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # A figure of its own, outside pyplot, draws with Agg and leaves the user's backend and figures alone.
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 6.6), layout="constrained", facecolor="white")
        seconds, memory = figure.subplots(2, 2)
        samples, actors = [p.setup.samples for p in by_samples], [p.setup.actors for p in by_actors]
        for column, costs, x, label in (
            (0, by_samples, samples, f"samples in a step, with {by_samples[0].setup.actors} actors"),
            (1, by_actors, actors, f"actors, with {by_actors[0].setup.samples:,} samples"),
        ):
            _seconds(seconds[column], costs, x, bound)
            _memory(memory[column], costs, x)
            for axes in (seconds[column], memory[column]):
                axes.set_xscale("log", base=2)
                axes.set_xticks(x, [f"{number:,}" for number in x])
                axes.minorticks_off()
                axes.set_xlabel(label)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def _seconds(axes: "Axes", costs: Sequence[Cost], x: Sequence[int], bound: float) -> None:
    axes.set_title("Controller's time in a step")
    axes.set_ylabel("CPU seconds")
    axes.set_yscale("log")
    lines: tuple[tuple[list[float], str, dict[str, Any]], ...] = (
        ([bound * cost.setup.step.seconds for cost in costs], f"{bound:.0%} of a real step", {"linestyle": "--"}),
        ([cost.cpu_s for cost in costs], "all threads of its process", {"marker": "o"}),
        ([cost.thread_s for cost in costs], "its own thread", {"marker": "o"}),
    )
    for (y, label, style), colour in zip(lines, ("#777777", *COLOURS), strict=False):
        axes.plot(x, y, color=colour, linewidth=2.2, label=label, **style)
    axes.legend(loc="best")


def _memory(axes: "Axes", costs: Sequence[Cost], x: Sequence[int]) -> None:
    axes.set_title("Controller's memory")
    axes.set_ylabel("MB beyond the start, at most")
    axes.plot(x, [cost.bytes / 1e6 for cost in costs], color=COLOURS[0], linewidth=2.2, marker="o")
    axes.set_ylim(bottom=0)
