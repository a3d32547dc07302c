"""The report on a reward model, from scores that are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlhf_ray.algorithms.calibration import wilson_interval
from rlhf_ray.config.reward_loss import BradleyTerry, PlackettLuce
from rlhf_ray.controllers.reward_model import comparison_metrics, report_of
from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.data.trajectory import offsets_of
from rlhf_ray.telemetry.reliability_plot import plot_reliability
from rlhf_ray.telemetry.reward_report import read_report, write_report


def comparisons(ranks: list[list[int]], margins: list[float] | None = None) -> ComparisonSet:
    flat = [rank for row in ranks for rank in row]
    return ComparisonSet(
        uids=tuple(map(str, range(len(ranks)))),
        token_ids=np.zeros(len(flat), np.int32),
        token_offsets=np.arange(len(flat) + 1),
        answer_starts=np.zeros(len(flat), np.int64),
        candidate_offsets=offsets_of([len(row) for row in ranks]),
        ranks=np.array(flat, np.int64),
        margins=np.array(margins or [0.0] * len(ranks), np.float32),
        weights=np.ones(len(ranks)),
        dropped=3,
        truncated=4,
    )


def scores(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_pairs_are_counted_and_judged() -> None:
    rows = comparisons([[0, 1], [1, 0], [0, 1], [0, 0]], margins=[1.0, 2.0, 3.0, 0.0])
    report = report_of(rows, scores(2, 0, 0, 1, -1, 3, 7, 7), 5, "pairs.jsonl", held_out=True)
    assert report.step == 5
    assert (report.rows.rows, report.rows.candidates, report.rows.pairs, report.rows.ties) == (4, 8, 3, 1)
    assert (report.rows.dropped, report.rows.truncated, report.rows.file) == (3, 4, "pairs.jsonl")
    assert report.accuracy is not None
    assert (report.accuracy.value, report.accuracy.count) == (pytest.approx(2 / 3), 3)
    assert (report.accuracy.low, report.accuracy.high) == pytest.approx(wilson_interval(2, 3))
    assert [(b.low, b.accuracy.value) for b in report.by_margin] == [(1.0, 1.0), (2.0, 1.0), (3.0, 0.0)]
    assert [(b.low, b.accuracy.value) for b in report.by_difference] == [(1.0, 1.0), (2.0, 1.0), (4.0, 0.0)]
    assert report.by_rank_distance == []
    sure = [1 / (1 + math.exp(-d)) for d in (1, 2, 4)]
    assert [b.confidence for b in report.reliability] == pytest.approx(sure)
    assert report.calibration_error == pytest.approx(((1 - sure[0]) + (1 - sure[1]) + sure[2]) / 3)


def test_equal_scores_are_not_right() -> None:
    report = report_of(comparisons([[0, 1], [0, 1]]), scores(0.5, 0.5, 0.5, 0.25), 1, "f", held_out=True)
    assert report.accuracy is not None
    assert report.accuracy.value == 0.5


def test_the_distribution_of_the_scores_is_of_all_and_of_the_best() -> None:
    report = report_of(comparisons([[0, 1], [1, 0]]), scores(4, 0, -2, 2), 1, "f", held_out=True)
    assert {name: (d.count, d.mean, d.std) for name, d in report.scores.items()} == {
        "all": (4, 1.0, pytest.approx(math.sqrt(5))),
        "best of a row": (2, 3.0, 1.0),
        "others": (2, -1.0, 1.0),
    }
    assert report.scores["all"].percentiles["50"] == 1.0


def test_rankings_are_judged_by_pair_and_by_distance_and_not_by_margin() -> None:
    rows = comparisons([[0, 1, 2], [2, 1, 0]], margins=[1.0, 1.0])
    report = report_of(rows, scores(3, 2, 1, 1, 0, 3), 1, "f", held_out=True)
    assert report.accuracy is not None
    assert (report.accuracy.value, report.accuracy.count) == (pytest.approx(5 / 6), 6)
    assert [(b.low, b.high, b.accuracy.value) for b in report.by_rank_distance] == [(1, 1, 0.75), (2, 2, 1.0)]
    assert report.by_margin == []


def test_the_pairs_of_a_ranking_do_not_count_as_independent() -> None:
    right, wrong = [0, 1, 2, 3], [3, 2, 1, 0]
    report = report_of(comparisons([right, wrong] * 20), scores(*[3, 2, 1, 0] * 40), 1, "f", held_out=True)
    assert report.accuracy is not None
    assert (report.accuracy.value, report.accuracy.count) == (0.5, 240)
    assert (report.accuracy.low, report.accuracy.high) == pytest.approx(wilson_interval(20, 40))


def test_metrics_are_those_of_all_rows_however_many() -> None:
    random = np.random.default_rng(1)
    rows = comparisons([[0, 1]] * 1500)
    found = random.normal(size=3000).astype(np.float32)
    difference = (found[0::2] - found[1::2]).astype(np.float64)
    metrics = comparison_metrics(BradleyTerry(type="bradley_terry"), rows, found)
    assert metrics["accuracy"] == pytest.approx((difference > 0).mean())
    assert metrics["margin"] == pytest.approx(difference.mean(), rel=1e-4, abs=1e-5)
    assert metrics["loss"] == pytest.approx(np.log1p(np.exp(-difference)).mean(), rel=1e-5)
    ranked = comparison_metrics(PlackettLuce(type="plackett_luce"), comparisons([[1, 0, 2]]), scores(0, 0, 0))
    assert ranked["loss"] == pytest.approx(math.log(6))
    assert ranked["accuracy"] == 0  # equal scores are no preference


def test_the_report_is_written_for_people_and_for_programs(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    rows = comparisons([[0, 1]] * 200, margins=random.uniform(1, 4, 200).tolist())
    found = random.normal(size=400).astype(np.float32)
    found[0::2] += 1
    report = report_of(rows, found, 7, "held_out.jsonl", held_out=True)
    write_report(tmp_path, report)
    assert report.accuracy is not None
    assert read_report(tmp_path)["accuracy"]["low"] == report.accuracy.low
    assert json.loads((tmp_path / "reward_report.json").read_text())["rows"]["held_out"] is True
    page = (tmp_path / "reward_report.md").read_text()
    assert page.startswith("# Reward model after step 7\n")
    assert "200 held-out rows of `held_out.jsonl`" in page
    assert f"**Accuracy {report.accuracy.value:.3f} (" in page
    tables = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert set(tables) == {4, 5, 12}
    for title in ("margin of the people", "difference of the scores", "Calibration", "Scores"):
        assert title in page
    assert "ranks" not in page

    picture = plot_reliability(tmp_path)
    assert picture == tmp_path / "reliability.png"
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 50


def test_training_rows_are_called_what_they_are(tmp_path: Path) -> None:
    write_report(tmp_path, report_of(comparisons([[0, 1]]), scores(1, 0), 1, "train.jsonl", held_out=False))
    assert "rows that the model was trained on (data.eval is not set) of `train.jsonl`" in (
        (tmp_path / "reward_report.md").read_text()
    )


def test_ties_alone_give_scores_and_nothing_else(tmp_path: Path) -> None:
    report = report_of(comparisons([[0, 0]]), scores(1, 3), 1, "f", held_out=True)
    assert (report.accuracy, report.calibration_error, report.reliability) == (None, None, [])
    write_report(tmp_path, report)
    assert "Accuracy" not in (tmp_path / "reward_report.md").read_text()
    assert plot_reliability(tmp_path) is None
