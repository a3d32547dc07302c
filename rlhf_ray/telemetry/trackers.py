"""TensorBoard, Weights & Biases and MLflow behind one interface. Each library is imported when it is configured."""

import importlib.util
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_ray.config.run import Mlflow, Run, Wandb
from rlhf_ray.recovery.files import replace_file
from rlhf_ray.telemetry.errors import MissingTrackerError


class Tracker(ABC):
    """Takes every step's metrics, all of them finite."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take one step."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Deliver what is buffered and end."""

    def __str__(self) -> str:
        return type(self).__name__


def check_trackers(run: Run) -> None:
    """Raise `MissingTrackerError` when a configured tracker is not installed; imports none, so it is quick."""
    for package, section in (("wandb", run.wandb), ("mlflow", run.mlflow)):
        if section is not None:
            spec = importlib.util.find_spec(package)
            # A folder of that name in the working directory (W&B makes one) is found as a package without a file.
            if spec is None or spec.origin is None:
                raise MissingTrackerError(package)


def start_trackers(
    run_dir: Path, run: Run, name: str, config: Mapping[str, Any], resume_step: int | None
) -> list[Tracker]:
    """The trackers that `run` configures, going on with the same remote run when this one is resumed.

    Raises:
        MissingTrackerError: one of them is not installed.
    """
    check_trackers(run)
    trackers: list[Tracker] = []
    if run.tensorboard:
        trackers.append(TensorBoardTracker(run_dir / "tensorboard", resume_step))
    if run.wandb is not None:
        trackers.append(WandbTracker(run_dir, run.wandb, name, config, resume_step))
    if run.mlflow is not None:
        trackers.append(MlflowTracker(run_dir, run.mlflow, name, config, resume_step))
    return trackers


class TensorBoardTracker(Tracker):
    """Event files; a resumed run has its readers drop what an earlier one logged beyond `resume_step`."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers drop events from purge_step on.
        self._writer = SummaryWriter(str(folder), purge_step=0 if resume_step is None else resume_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandbTracker(Tracker):
    """One W&B run per run folder; its files and its id lie there."""

    def __init__(
        self, run_dir: Path, section: Wandb, name: str, config: Mapping[str, Any], resume_step: int | None
    ) -> None:
        import wandb

        run_id = _remembered(run_dir / "wandb.id", resume_step) or uuid.uuid4().hex
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            name=name,
            config=dict(config),
            dir=str(run_dir),
            id=run_id,
            resume="allow",
        )
        _remember(run_dir / "wandb.id", run_id)
        # W&B's own step only ever grows, and would reject steps that a resumed run does again.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class MlflowTracker(Tracker):
    """One MLflow run per run folder; its id lies there. Steps that a resumed run does again have two values, as
    MLflow takes nothing back. Uses the client, which leaves MLflow's global run alone."""

    def __init__(
        self, run_dir: Path, section: Mlflow, name: str, config: Mapping[str, Any], resume_step: int | None
    ) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=section.tracking_uri)
        run_id = _remembered(run_dir / "mlflow.id", resume_step)
        if run_id is not None:
            self._run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(section.experiment)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(section.experiment)
        self._run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
        _remember(run_dir / "mlflow.id", self._run_id)
        # A request takes at most 100 parameters, each of at most 6000 characters.
        params = [Param(key, str(value)[:6000]) for key, value in _flat(config)]
        for start in range(0, len(params), 100):
            self._client.log_batch(self._run_id, params=params[start : start + 100])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._client.log_batch(
            self._run_id, metrics=[Metric(name, value, now_ms, step) for name, value in metrics.items()]
        )

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


def _remembered(path: Path, resume_step: int | None) -> str | None:
    if resume_step is None or not path.exists():
        return None
    return path.read_text(encoding="utf-8").strip() or None


def _remember(path: Path, run_id: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, f"{run_id}\n".encode())


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
