"""reliability.png: how often a reward model is right, by how sure it is."""

from pathlib import Path

import numpy as np

from rlhf_ray.algorithms.calibration import wilson_interval
from rlhf_ray.telemetry.plots import COLOURS, STYLE
from rlhf_ray.telemetry.reward_report import read_report


def plot_reliability(run_dir: Path) -> Path | None:
    """Draw the reliability bins of reward_report.json, and the scores beside them.

    Returns:
        The picture, `reliability.png` in the run folder; None when the report has no pairs to draw.

    Raises:
        FileNotFoundError: the run has no report.
    """
    import matplotlib
    from matplotlib.figure import Figure

    report = read_report(run_dir)
    bins = report["reliability"]
    if not bins:
        return None
    blue, orange = COLOURS[:2]
    confidence, accuracy, count = (np.array([b[key] for b in bins]) for key in ("confidence", "accuracy", "count"))
    bounds = np.array([wilson_interval(p * n, n) for p, n in zip(accuracy, count, strict=True)])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 6.4), layout="constrained", facecolor="white")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0.5, 1], [0.5, 1], color="#999999", linestyle="--", linewidth=1.4, label="as often as it says")
        upper.errorbar(
            confidence,
            accuracy,
            yerr=np.abs(bounds.T - accuracy),
            color=blue,
            marker="o",
            linewidth=2.2,
            elinewidth=1.2,
            capsize=3,
            label="this model, with 95 % intervals",
        )
        upper.set_title(f"Reliability: calibration error {report['calibration_error']:.3f}")
        upper.set_ylabel("share of pairs it has right")
        upper.legend(loc="lower right")
        middle = [(b["low"] + b["high"]) / 2 for b in bins]
        lower.bar(middle, count, width=0.8 * (bins[0]["high"] - bins[0]["low"]), color=orange)
        lower.set_ylabel("pairs")
        lower.set_xlabel("confidence: σ(|difference of the scores|)")
        path = run_dir / "reliability.png"
        figure.savefig(path, dpi=140)
    return path
