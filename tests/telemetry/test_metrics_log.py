"""metrics.jsonl: every step once, exact, and after a resumption without what the killed run logged too much."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.config.run import Run
from rlhf_ray.telemetry.errors import DamagedFileError, NonFiniteError, StepOrderError, TelemetryError
from rlhf_ray.telemetry.metrics import Mean, MetricsLog, read_metrics, reduce_means, sum_means
from rlhf_ray.telemetry.trackers import Tracker


def _log(folder: Path, resume_step: int | None = None) -> MetricsLog:
    return MetricsLog(folder, Run(dir=str(folder), tensorboard=False), "name", {}, resume_step)


def _write_steps(folder: Path, steps: range, resume_step: int | None = None) -> None:
    with _log(folder, resume_step) as log:
        for step in steps:
            log.write(step, {"reward/mean": step / 3, "kl/mean": -step})


def test_rows_come_back_exactly_with_step_first_and_names_sorted(tmp_path: Path) -> None:
    float32: Any = np.float32(0.1)
    with _log(tmp_path) as log:
        log.write(1, {"reward/mean": 0.1 + 0.2, "kl/mean": float32, "critic/loss": 5e-324})
        assert read_metrics(tmp_path) == [
            {"step": 1, "reward/mean": 0.1 + 0.2, "kl/mean": 0.10000000149011612, "critic/loss": 5e-324}
        ], "a row is on disk when write returns"
    line = (tmp_path / "metrics.jsonl").read_text()
    assert list(json.loads(line)) == ["step", "critic/loss", "kl/mean", "reward/mean"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_a_number_is_refused_by_name_and_nothing_is_written(tmp_path: Path, bad: float) -> None:
    with _log(tmp_path) as log:
        with pytest.raises(NonFiniteError, match=r"step 4: policy/loss is (nan|-?inf)") as error:
            log.write(4, {"policy/loss": bad, "reward/mean": 1.0})
        assert list(error.value.values) == ["policy/loss"]
        assert read_metrics(tmp_path) == []
        log.write(4, {"policy/loss": 0.0})


def test_a_resumed_run_takes_back_rows_beyond_its_checkpoint(tmp_path: Path) -> None:
    _write_steps(tmp_path, range(1, 8))
    undisturbed = (tmp_path / "metrics.jsonl").read_bytes()
    _write_steps(tmp_path, range(4, 8), resume_step=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == undisturbed


def test_resuming_at_the_last_row_leaves_the_file_alone(tmp_path: Path) -> None:
    _write_steps(tmp_path, range(1, 4))
    before = (tmp_path / "metrics.jsonl").stat()
    _log(tmp_path, resume_step=3).close()
    after = (tmp_path / "metrics.jsonl").stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)


def test_a_run_from_the_start_drops_rows_of_one_that_left_no_checkpoint_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write_steps(tmp_path, range(1, 4))
    with caplog.at_level(logging.WARNING):
        _write_steps(tmp_path, range(1, 3), resume_step=None)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert "removed 3 rows" in caplog.text


def test_a_line_torn_by_a_kill_is_dropped_when_the_run_resumes(tmp_path: Path) -> None:
    _write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    _write_steps(tmp_path, range(3, 5), resume_step=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_removal_is_atomic_so_a_kill_in_the_middle_keeps_the_old_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_steps(tmp_path, range(1, 8))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        _log(tmp_path, resume_step=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_line_damaged_by_something_else_is_named_with_file_and_line(tmp_path: Path) -> None:
    _write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"step": 2', b'{"step" 2'))
    with pytest.raises(DamagedFileError, match=r"metrics\.jsonl: line 2 is not JSON.*repair"):
        _log(tmp_path, resume_step=3)
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(DamagedFileError, match="line 1 is not JSON"):
        _log(tmp_path, resume_step=3)
    path.write_text('{"epoch": 2}\n')
    with pytest.raises(DamagedFileError, match="line 1 is not an object with an integer step"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("step", [5, 4])
def test_a_step_is_written_once_and_in_order(tmp_path: Path, step: int) -> None:
    with _log(tmp_path) as log:
        log.write(5, {"kl/mean": 0.0})
        with pytest.raises(StepOrderError, match=f"step {step} .* after step 5"):
            log.write(step, {"kl/mean": 0.0})
    with _log(tmp_path, resume_step=5) as log, pytest.raises(StepOrderError):
        log.write(step, {"kl/mean": 0.0})


def test_a_metric_may_not_be_called_step(tmp_path: Path) -> None:
    with _log(tmp_path) as log, pytest.raises(TelemetryError, match="rename it"):
        log.write(1, {"step": 2.0})


class _Tracker(Tracker):
    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.seen: list[int] = []
        self.closed: list[bool] = []

    def log(self, step: int, metrics: object) -> None:
        if self.fails:
            raise ConnectionError("no route to the tracker")
        self.seen.append(step)

    def close(self, failed: bool) -> None:
        self.closed.append(failed)
        if self.fails:
            raise ConnectionError("no route to the tracker")


def test_a_tracker_that_fails_is_a_warning_and_stops_neither_the_run_nor_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    down, up = _Tracker(fails=True), _Tracker(fails=False)
    monkeypatch.setattr("rlhf_ray.telemetry.metrics.start_trackers", lambda *_: [down, up])
    with _log(tmp_path) as log:
        log.write(1, {"kl/mean": 0.0})
        log.write(2, {"kl/mean": 0.0})
    assert up.seen == [1, 2]
    assert up.closed == down.closed == [False]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert "did not take step 2; it is in metrics.jsonl" in caplog.text


def test_trackers_learn_that_a_run_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = _Tracker(fails=False)
    monkeypatch.setattr("rlhf_ray.telemetry.metrics.start_trackers", lambda *_: [tracker])
    with pytest.raises(RuntimeError), _log(tmp_path):
        raise RuntimeError("the run broke")
    assert tracker.closed == [True]


@given(st.lists(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(1, 50)), max_size=6), min_size=1, max_size=5))
def test_means_of_ranks_add_up_to_the_mean_of_all_values(ranks: list[list[tuple[float, int]]]) -> None:
    parts = [
        {"loss": sum((Mean(value * weight, weight) for value, weight in rank), Mean()), "idle": Mean()}
        for rank in ranks
    ]
    values = [value for rank in ranks for value, weight in rank for _ in range(weight)]
    reduced = reduce_means(parts)
    assert "idle" not in reduced
    assert ("loss" in reduced) == bool(values)
    if values:
        assert reduced["loss"] == pytest.approx(math.fsum(values) / len(values), rel=1e-9, abs=1e-9)


def test_the_mean_of_nothing_has_no_value() -> None:
    with pytest.raises(TelemetryError, match="mean of no values"):
        _ = Mean().value


def test_a_part_without_a_name_leaves_the_sum_of_the_others() -> None:
    parts = [{"loss": Mean(3.0, 1.0), "kl": Mean(1.0, 1.0)}, {}, {"loss": Mean(5.0, 1.0)}, {}]
    assert sum_means(parts) == {"loss": Mean(8.0, 2.0), "kl": Mean(1.0, 1.0)}
