"""A job whose step times and memory are measured, run as `rlhf-ray train` runs it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf_ray.actors.host_memory import held_together
from rlhf_ray.config.jobs import JobConfig
from rlhf_ray.telemetry.metrics import Metrics

_ROLES = {
    "PolicyWorker": "policy",
    "SFTWorker": "policy",
    "PreferenceWorker": "policy",
    "CriticWorker": "critic",
    "ReferenceWorker": "reference",
    "RewardModelWorker": "reward",
    "RewardTrainingWorker": "reward",
    "RolloutWorker": "rollout",
}
_INTERVAL_S = 0.05
_NEW_PROCESSES_S = 1.0


@dataclass(frozen=True)
class MeasuredJob:
    """A run that is over.

    Attributes:
        rows: metrics of its steps but the first, which pays for warming up.
        peaks: most bytes of memory of one process of each role, for engines of all their processes together.
    """

    rows: list[Metrics]
    peaks: dict[str, int]


def measured_job(job: JobConfig) -> MeasuredJob:
    """Run a job from its start in its own folder."""
    from rlhf_ray.controllers.train import train
    from rlhf_ray.telemetry.metrics import read_metrics

    with peaks() as found:
        train(job)
    return MeasuredJob(read_metrics(Path(job.run.dir))[1:], dict(found))


@contextmanager
def peaks() -> Iterator[dict[str, int]]:
    """The most memory that a process of each role holds meanwhile, looked at all the time."""
    found: dict[str, int] = {}
    done = threading.Event()

    def watch() -> None:
        families: list[tuple[str, list[psutil.Process]]] = []
        looked_for_s = 0.0
        while not done.wait(_INTERVAL_S):
            if time.monotonic() - looked_for_s > _NEW_PROCESSES_S:
                families, looked_for_s = _families(), time.monotonic()
            for role, family in families:
                found[role] = max(found.get(role, 0), held_together(family))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def _families() -> list[tuple[str, list[psutil.Process]]]:
    """The processes of each actor that runs, by its role."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or ())
        for worker, role in _ROLES.items():
            if title.startswith(f"ray::{worker}"):
                found.append((role, [process, *_children(process)] if role == "rollout" else [process]))
    return found


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []
