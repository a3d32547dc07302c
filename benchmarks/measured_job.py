"""A job whose step times and memory are measured, run as `rlhf-ray train` runs it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
_INTERVAL_S = 0.25


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
    """The most memory of a process of each role that runs meanwhile. The kernel keeps each process's own peak; it is
    looked at until the process ends."""
    found: dict[str, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_INTERVAL_S):
            for role, peak in _peaks_now().items():
                found[role] = max(found.get(role, 0), peak)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def _peaks_now() -> dict[str, int]:
    found: dict[str, int] = {}
    children: dict[int, list[int]] = {}
    actors: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            title = (entry / "cmdline").read_bytes().decode(errors="replace")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(entry.name))
        for worker, role in _ROLES.items():
            if title.startswith(f"ray::{worker}"):
                actors[int(entry.name)] = role
    for process, role in actors.items():
        family = [process, *children.get(process, ())] if role == "rollout" else [process]
        found[role] = max(found.get(role, 0), sum(map(_peak, family)))
    return found


def _peak(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines.get("VmHWM", "0").split()[0]) * 1024
