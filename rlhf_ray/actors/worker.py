"""What every rank of every role has: a place in its group, seeded randomness, and a record of what it did when."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import ray
import torch

from rlhf_ray.actors.group import ActorGroup, on_all, wait_together
from rlhf_ray.actors.watched import Watched
from rlhf_ray.config.roles import Level
from rlhf_ray.config.run import Timeouts
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.engines.collectives import Rendezvous, join_collectives
from rlhf_ray.engines.interfaces import use_interface_of
from rlhf_ray.platform import device_memory
from rlhf_ray.telemetry.trace import SpanRecorder, in_span

if TYPE_CHECKING:
    from rlhf_ray.engines.training import ForwardEngine, TrainingEngine


@dataclass(frozen=True)
class DataSlice:
    """Which of several equal parts of some samples a rank works on.

    Attributes:
        index: of the part, from 0.
        count: of parts.
        reports: whether results are this rank's to give. Of the ranks that work on the same part because they share
            sequences one gives them, the others give none.
    """

    index: int
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
    def data_slice(self) -> DataSlice:
        """This rank's part of the samples: that of its neighbours too where they share sequences."""
        sp_size = self.engine.sequence_parallel
        return DataSlice(self.rank // sp_size, self.world_size // sp_size, reports=self.rank % sp_size == 0)

    def slice_of(self, index: int, count: int) -> DataSlice:
        """A part of some samples, which this rank works on alone or with those that it shares sequences with."""
        return DataSlice(index, count, reports=self.data_slice.reports)

    def device_bytes(self) -> tuple[int, int] | None:
        """Device memory in use and in all; None on CPU."""
        return device_memory()


WorkerT = TypeVar("WorkerT", bound=Worker)


class RankGroup(ActorGroup[WorkerT]):
    """Ranks that meet for collectives."""

    move = on_all(Worker.move)


def join_collectives_of(groups: Sequence[RankGroup[Any]], timeouts: Timeouts) -> None:
    """Have the ranks of each group meet at its rank 0."""
    first = [group.call_rank(0, Worker.address) for group in groups]
    addresses = [calls.wait(timeouts.setup)[0] for calls in first]
    # A collective must outlast the slowest rank's longest phase; the controller's own limits end a run sooner.
    longest = max(timeouts.setup_s, timeouts.update_s, timeouts.score_s, timeouts.checkpoint_s)
    joined = [
        group.call(Worker.join, host, port, longest) for group, (host, port) in zip(groups, addresses, strict=True)
    ]
    wait_together(joined, timeouts.setup, "ranks joining their groups")


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
