"""curves.png shows what a run logged, whatever that is."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rlhf_ray.config.run import Run
from rlhf_ray.telemetry.errors import TelemetryError
from rlhf_ray.telemetry.metrics import Metrics, MetricsLog
from rlhf_ray.telemetry.plots import PANELS, _draw, _moving_mean, _present, plot_curves


def _ppo_row(step: int) -> Metrics:
    wave = float(np.sin(step))
    return {
        "step": step,
        "reward/mean": step / 10 + wave,
        "reward/std": 1.0,
        "reward/model": step / 5,
        "reward/vader": wave,
        "kl/mean": step / 7,
        "kl/coef": 0.05,
        "policy/loss": wave / 100,
        "critic/loss": 1 / step,
        "response/length_mean": 20 + wave,
    }


def _write(folder: Path, rows: list[Metrics]) -> None:
    with MetricsLog(folder, Run(dir=str(folder), tensorboard=False), "x", {}) as log:
        for row in rows:
            log.write(int(row["step"]), {name: value for name, value in row.items() if name != "step"})


@pytest.mark.parametrize("steps", [1, 2, 9, 40])
def test_the_picture_is_a_png_of_readme_size_that_is_not_empty(tmp_path: Path, steps: int) -> None:
    _write(tmp_path, [_ppo_row(step) for step in range(1, steps + 1)])
    path = plot_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert 1200 <= picture.width <= 2400
        assert 0.4 < picture.height / picture.width < 1.0
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 50


def test_every_part_of_the_reward_has_a_labelled_curve() -> None:
    from matplotlib.figure import Figure

    rows = [_ppo_row(step) for step in range(1, 41)]
    parts = next(panel for panel in PANELS if panel.metrics == ("reward/*",))
    assert _present(parts, rows) == ["reward/model", "reward/vader"]
    axes = Figure().subplots()
    _draw(axes, parts, _present(parts, rows), rows, window=5)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["model", "vader"]
    raw, smooth = axes.get_lines()[:2]
    assert np.asarray(raw.get_ydata()).tolist() == [row["reward/model"] for row in rows], "the raw values stay visible"
    assert (raw.get_alpha() or 1.0) < 0.5 < (smooth.get_alpha() or 1.0)
    assert (axes.get_title(loc="left") or axes.get_title(), axes.get_xlabel()) == ("Parts of the reward", "step")


def test_a_reward_model_run_with_few_evaluations_is_drawn(tmp_path: Path) -> None:
    rows: list[Metrics] = [{"step": step, "train/loss": 1 / step, "train/accuracy": 0.5} for step in range(1, 30)]
    _write(tmp_path, [{"step": 0, "eval/accuracy": 0.5}, *rows, {"step": 30, "eval/accuracy": 0.9}])
    assert plot_curves(tmp_path).stat().st_size > 10_000


def test_a_run_without_rows_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        plot_curves(tmp_path)
    _write(tmp_path, [{"step": 1, "time/step_s": 2.0}])
    with pytest.raises(TelemetryError, match=r"metrics\.jsonl has none of the metrics that are drawn"):
        plot_curves(tmp_path)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(0, 6).map(lambda half: 2 * half + 1))
def test_the_moving_mean_is_that_of_the_neighbours(values: list[float], window: int) -> None:
    half = window // 2
    expected = [float(np.mean(values[max(0, index - half) : index + half + 1])) for index in range(len(values))]
    assert _moving_mean(np.array(values), window) == pytest.approx(expected, abs=1e-9)
