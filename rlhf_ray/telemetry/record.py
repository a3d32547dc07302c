"""What the folder of a run tells of it when nobody else can: how far it came, and how it ended."""

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from rlhf_ray.recovery.checkpoints import CheckpointStore
from rlhf_ray.telemetry.manifest import Outcome, Session, last_session
from rlhf_ray.telemetry.metrics import read_metrics


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells.

    Attributes:
        run_dir: absolute.
        session: the newest.
        step: the last one in metrics.jsonl, 0 before the first.
        metrics: of that step.
        checkpoint: step of the newest complete checkpoint, None without one.
        driver_alive: whether there is a process with the driver's id on this machine; None when the driver ran on
            another.
    """

    run_dir: str
    session: Session
    step: int
    metrics: dict[str, float]
    checkpoint: int | None
    driver_alive: bool | None

    @property
    def state(self) -> Outcome | Literal["running", "lost"]:
        """How it ended; without an end `running` when its driver is known to live, else `lost`."""
        if self.session.end is not None:
            return self.session.end.outcome
        return "running" if self.driver_alive else "lost"


def read_record(run_dir: Path) -> RunRecord:
    """Read the folder of a run.

    Raises:
        FileNotFoundError: it is no folder of a run.
        DamagedFileError: one of its files was changed by something else.
    """
    session = last_session(run_dir)
    rows = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    last = dict(rows[-1]) if rows else {}
    steps = CheckpointStore(run_dir, keep_last=1, keep_best=None).steps()
    return RunRecord(
        run_dir=str(run_dir.absolute()),
        session=session,
        step=int(last.pop("step", 0)),
        metrics=last,
        checkpoint=steps[-1] if steps else None,
        driver_alive=psutil.pid_exists(session.pid) if session.host == socket.gethostname() else None,
    )
