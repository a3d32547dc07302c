"""A job whose memory and step times are measured, run as `rlhf-ray train` runs it.

Memory is looked at all the time, which takes up to half a core: it is measured in the first steps, and time after them.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf_ray.actors.host_memory import sum_of_held_bytes
from rlhf_ray.config.jobs import Job
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
WATCHED_STEPS = 2
"""The first steps, whose memory counts: in the second one the optimizer has its states from the start."""

_INTERVAL_S = 0.05
_NEW_PROCESSES_S = 1.0


@dataclass(frozen=True)
class MeasuredJob:
    """A run that is over.

    Attributes:
        rows: metrics of its steps but the first ones, which pay for warming up and for looking at memory.
        peaks: most bytes of memory of one process of each role until then, for engines of all their processes together.
    """

    rows: list[Metrics]
    peaks: dict[str, int]


def measured_job(job: Job) -> MeasuredJob:
    """Run a job from its start in its own folder, with more than `WATCHED_STEPS` steps."""
    from rlhf_ray.controllers.train import train

    folder = Path(job.run.dir)
    with peaks(lambda: len(_rows(folder)) >= WATCHED_STEPS) as found:
        train(job)
    return MeasuredJob(_rows(folder)[WATCHED_STEPS:], dict(found))


def _rows(folder: Path) -> list[Metrics]:
    from rlhf_ray.telemetry.metrics import read_metrics

    try:
        return read_metrics(folder)
    except FileNotFoundError:  # no step is complete yet
        return []


@contextmanager
def peaks(enough: Callable[[], bool]) -> Iterator[dict[str, int]]:
    """The most memory that a process of each role holds until it is enough."""
    found: dict[str, int] = {}
    done = threading.Event()

    def watch() -> None:
        families: list[tuple[str, list[psutil.Process]]] = []
        looked_for_s = 0.0
        while not done.wait(_INTERVAL_S):
            if time.monotonic() - looked_for_s > _NEW_PROCESSES_S:
                if enough():
                    return
                families, looked_for_s = _families(), time.monotonic()
            for role, family in families:
                found[role] = max(found.get(role, 0), sum_of_held_bytes(family))

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
