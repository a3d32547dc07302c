"""What every rank of every role has: a place in its group, seeded randomness, and a record of what it did when."""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import ray
import torch

from rlhf_ray.actors.address import own_address
from rlhf_ray.actors.watched import Watched
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.engines.collectives import Rendezvous, join_collectives
from rlhf_ray.engines.interfaces import use_interface_of
from rlhf_ray.engines.level import Level
from rlhf_ray.platform import device_memory
from rlhf_ray.telemetry.trace import Span, SpanRecorder, in_span

if TYPE_CHECKING:
    from rlhf_ray.engines.training import ForwardEngine, TrainingEngine


@dataclass(frozen=True)
class Share:
    """What part of the samples a rank works on.

    Attributes:
        number: of the part, from 0.
        count: of parts.
        reports: whether results are this rank's to give. Of the ranks that work on the same part together one gives
            them, the others give none.
    """

    number: int
    count: int
    reports: bool = True


class Worker(Watched):
    """One rank of a role."""

    engine: "TrainingEngine | ForwardEngine"

    def __init__(self, role: str, rank: int, world_size: int, seed: int, deterministic: bool) -> None:
        self.role, self.rank, self.world_size = role, rank, world_size
        self.recorder = SpanRecorder()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        seed_everything(derive_seed(seed, role, rank), deterministic)

    def address(self) -> tuple[str, int]:
        """Address of this node and a free port on it."""
        return own_address()

    @in_span("join")
    def join(self, host: str, port: int, timeout_s: float) -> None:
        """Join the group's collectives."""
        use_interface_of(ray.util.get_node_ip_address())
        join_collectives(Rendezvous(self.rank, self.world_size, host, port, timeout_s))

    def move(self, level: Level) -> None:
        """Leave the device to others, or come back to it, as far as `level` says."""
        with self.recorder.span(f"going to {level.name.lower()}"):
            self.engine.move(level)

    @property
    def share(self) -> Share:
        """This rank's part of the samples: that of its neighbours too where they share sequences."""
        together = self.engine.sequence_parallel
        return Share(self.rank // together, self.world_size // together, reports=self.rank % together == 0)

    def share_of_part(self, part: int, parts: int) -> Share:
        """A part of some samples, which this rank works on alone or with those that it shares sequences with."""
        return Share(part, parts, reports=self.share.reports)

    def drain_spans(self) -> list[Span]:
        """What this rank did since the last call."""
        return self.recorder.drain()

    def device_bytes(self) -> tuple[int, int] | None:
        """Device memory in use and in all; None on CPU."""
        return device_memory()


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, numpy and torch; when `deterministic`, refuse kernels that give other bits each time."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Not also filling each new tensor: DeepSpeed allocates gigabytes that it never reads before writing.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def save_rng(path: Path) -> None:
    """Write the state of every random generator of this process."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "python": random.getstate(),
    }
    torch.save(state, path)


def load_rng(path: Path) -> None:
    """Set every random generator of this process to what `save_rng` wrote."""
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
