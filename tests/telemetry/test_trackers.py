"""TensorBoard, W&B and MLflow get every step; a missing package is told with its cure."""

import logging
import sys
from pathlib import Path

import pytest

from rlhf_ray.config.run import Mlflow, Run, Wandb
from rlhf_ray.telemetry.errors import MissingTrackerError
from rlhf_ray.telemetry.metrics import MetricsLog
from rlhf_ray.telemetry.trackers import check_trackers


@pytest.fixture(autouse=True)
def a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers order event files of the same second by a counter of the process, as text: 10 comes before 9."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def _write(run: Run, steps: range, resume_step: int | None = None) -> None:
    with MetricsLog(Path(run.dir), run, "sentiment", {"seed": 7, "policy": {"lr": 1e-6}}, resume_step) as log:
        for step in steps:
            log.write(step, {"reward/mean": step / 10 if resume_step is None else step / 10 + 1})


def _scalars(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("reward/mean")]


def test_tensorboard_reads_every_step_back(tmp_path: Path) -> None:
    _write(Run(dir=str(tmp_path)), range(1, 4))
    assert _scalars(tmp_path / "tensorboard") == [(step, pytest.approx(step / 10)) for step in (1, 2, 3)]


def test_tensorboard_drops_steps_beyond_the_checkpoint_that_a_run_resumed_from(tmp_path: Path) -> None:
    _write(Run(dir=str(tmp_path)), range(1, 6))
    _write(Run(dir=str(tmp_path)), range(3, 5), resume_step=2)
    expected = [(1, 0.1), (2, 0.2), (3, 1.3), (4, 1.4)]
    assert _scalars(tmp_path / "tensorboard") == [(step, pytest.approx(value)) for step, value in expected]


def test_tensorboard_starts_anew_when_the_run_does(tmp_path: Path) -> None:
    _write(Run(dir=str(tmp_path)), range(1, 6))
    _write(Run(dir=str(tmp_path)), range(1, 3))
    assert [step for step, _ in _scalars(tmp_path / "tensorboard")] == [1, 2]


def test_nothing_is_written_for_a_tracker_that_is_off(tmp_path: Path) -> None:
    _write(Run(dir=str(tmp_path), tensorboard=False), range(1, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("package", "run"),
    [
        ("wandb", Run(dir="x", wandb=Wandb(project="p"))),
        ("mlflow", Run(dir="x", mlflow=Mlflow(experiment="e"))),
    ],
)
def test_a_configured_tracker_that_is_not_installed_is_told_with_the_cure_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, run: Run
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingTrackerError, match=rf"run\.{package} is set.*pip install 'rlhf_ray\[{package}\]'"):
        check_trackers(run)
    with pytest.raises(MissingTrackerError):
        MetricsLog(tmp_path, run, "name", {}, None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_called_wandb_is_not_taken_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingTrackerError):
        check_trackers(Run(dir="x", wandb=Wandb(project="p")))


def test_wandb_gets_every_step_of_one_run_also_when_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = Run(dir=str(tmp_path), tensorboard=False, wandb=Wandb(project="p"))
    _write(run, range(1, 4))
    first = (tmp_path / "wandb.id").read_text()
    _write(run, range(3, 5), resume_step=2)
    assert (tmp_path / "wandb.id").read_text() == first
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{first.strip()}/*.wandb"))) >= 1
    _write(run, range(1, 2))
    assert (tmp_path / "wandb.id").read_text() != first


def test_mlflow_gets_every_step_of_one_run_also_when_resumed(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = Run(dir=str(tmp_path / "run"), tensorboard=False, mlflow=Mlflow(experiment="e", tracking_uri=uri))
    _write(run, range(1, 4))
    _write(run, range(4, 5), resume_step=3)
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert len(runs) == 1
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.params == {"seed": "7", "policy.lr": "1e-06"}
    history = client.get_metric_history(runs[0].info.run_id, "reward/mean")
    assert [metric.step for metric in history] == [1, 2, 3, 4]
