"""curves.png: how a run went, on one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.telemetry.errors import TelemetryError
from rlhf_ray.telemetry.metrics import Metrics, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

Series = NDArray[np.float64]

# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLE: "dict[RcKeyType, Any]" = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.solid_capstyle": "round",
}
_COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: what is shown.
        unit: label of the vertical axis.
        metrics: the curves; `reward/*` is every part of the reward.
        smooth: noisy, so drawn faintly with a moving mean on top.
        band: metric of the standard deviation around the only curve.
        from_zero: the vertical axis begins at 0.
    """

    title: str
    unit: str
    metrics: tuple[str, ...]
    smooth: bool = True
    band: str | None = None
    from_zero: bool = False


PANELS = (
    Panel("Reward", "mean ± deviation", ("reward/mean",), band="reward/std"),
    Panel("Parts of the reward", "mean, unweighted", ("reward/*",)),
    Panel("KL to the reference", "nats per response", ("kl/mean",), from_zero=True),
    Panel("KL coefficient β", "β", ("kl/coef",), smooth=False, from_zero=True),
    Panel("Response length", "tokens", ("response/length_mean",), from_zero=True),
    Panel("Policy loss", "clipped loss", ("policy/loss",)),
    Panel("Value loss", "clipped loss", ("critic/loss",)),
    Panel("Entropy", "nats per token", ("policy/entropy",)),
    Panel("Loss", "nats", ("train/loss", "eval/loss")),
    Panel("Pair accuracy", "share", ("train/accuracy", "eval/accuracy")),
    Panel("Log-ratio to the reference", "nats per answer", ("train/chosen_ratio", "train/rejected_ratio")),
    Panel("Log-ratio to the reference", "nats per answer", ("train/wanted_ratio", "train/unwanted_ratio")),
    Panel("Log-prob of the answers", "nats per token", ("train/chosen_logprob", "train/rejected_logprob")),
    Panel("Held-out perplexity", "per token", ("eval/perplexity",), smooth=False),
)


def plot_curves(run_dir: Path) -> Path:
    """Draw what metrics.jsonl has of `PANELS` and return the path of the picture, `curves.png` in the run folder.

    Raises:
        FileNotFoundError: the run has not logged yet.
        TelemetryError: metrics.jsonl has nothing to draw.
    """
    import matplotlib

    rows = read_metrics(run_dir)
    drawn = [(panel, names) for panel in PANELS if (names := _present(panel, rows))]
    if not drawn:
        raise TelemetryError(f"{run_dir / 'metrics.jsonl'} has none of the metrics that are drawn: finish a step first")
    with matplotlib.rc_context(STYLE):
        figure, grid = _layout(len(drawn))
        window = _window(len(rows))
        for axes, (panel, names) in zip(grid, drawn, strict=True):
            _draw(axes, panel, names, rows, window)
        if window > 1:
            note = f"faint: each step · bold: mean over {window} steps"
            figure.axes[0].set_title(note, loc="right", fontsize=10.5, fontweight="normal", color="#777777")
        figure.align_ylabels()
        path = run_dir / "curves.png"
        figure.savefig(path, dpi=140)
    return path


def _layout(panels: int) -> tuple["Figure", list["Axes"]]:
    """A figure and its axes row by row; the first is as wide as it takes to leave no gap at the end."""
    from matplotlib.figure import Figure

    rows, wide = -(-panels // _COLUMNS), 1 + -panels % _COLUMNS
    # A figure of its own, outside pyplot, draws with Agg and leaves the user's backend and figures alone.
    figure = Figure(figsize=(12, 2.7 * rows + 0.2), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08, hspace=0.02, wspace=0.02)
    grid = figure.add_gridspec(rows, _COLUMNS)
    cells = [grid[0, :wide], *(grid[cell // _COLUMNS, cell % _COLUMNS] for cell in range(wide, rows * _COLUMNS))]
    return figure, [figure.add_subplot(cell) for cell in cells]


def _draw(axes: "Axes", panel: Panel, names: Sequence[str], rows: Sequence[Metrics], window: int) -> None:
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True, nbins=7)
    axes.locator_params(axis="y", nbins=5)
    for name, colour in zip(names, cycle(COLOURS), strict=False):
        steps, values = _series(rows, name)
        # A curve with few points of its own, such as an evaluation, is not averaged over its neighbours.
        width = window if panel.smooth and len(values) >= len(rows) // 2 else 1
        if panel.band and len(names) == 1:
            _draw_band(axes, rows, name, panel.band, width, colour)
        if width > 1:
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
        marker = "o" if len(values) < 8 else None
        label = name.partition("/")[2] if name.startswith("reward/") else name
        axes.plot(steps, _moving_mean(values, width), color=colour, linewidth=2.2, label=label, marker=marker)
    if len(names) > 1:
        axes.legend(loc="best")
    if panel.from_zero:
        low, high = axes.get_ylim()
        negative = any(_series(rows, name)[1].min() < 0 for name in names)
        axes.set_ylim(low if negative else 0.0, high * 1.08 if high > 0 else 1.0)
    axes.margins(x=0.02)


def _draw_band(axes: "Axes", rows: Sequence[Metrics], mean: str, deviation: str, width: int, colour: str) -> None:
    both = [row for row in rows if mean in row and deviation in row]
    steps, middle = _series(both, mean)
    half = _moving_mean(_series(both, deviation)[1], width)
    middle = _moving_mean(middle, width)
    axes.fill_between(steps, middle - half, middle + half, color=colour, alpha=0.12, linewidth=0)


def _present(panel: Panel, rows: Sequence[Metrics]) -> list[str]:
    logged = {name for row in rows for name in row}
    parts = sorted(name for name in logged - {"reward/mean", "reward/std"} if name.startswith("reward/"))
    return parts if panel.metrics == ("reward/*",) else [name for name in panel.metrics if name in logged]


def _series(rows: Sequence[Metrics], name: str) -> tuple[Series, Series]:
    """Steps and values of the rows that have the metric."""
    having = [row for row in rows if name in row]
    return np.array([row["step"] for row in having], float), np.array([row[name] for row in having], float)


def _window(rows: int) -> int:
    """Odd, so that the mean stays centred; 1 (no smoothing) for short runs."""
    return 1 if rows < 10 else rows // 8 | 1


def _moving_mean(values: Series, window: int) -> Series:
    """Centred mean; at the ends over the part of the window that there is."""
    kernel, half = np.ones(window), window // 2
    sums = np.convolve(values, kernel)[half : half + len(values)]
    return sums / np.convolve(np.ones_like(values), kernel)[half : half + len(values)]
