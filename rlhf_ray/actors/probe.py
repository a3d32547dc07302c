"""Actors that measure what their machine gives: a policy that times its own passes, and pairs that talk."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from statistics import mean

import numpy as np
import ray
import torch
import torch.distributed as dist

from rlhf_ray.actors.group import ActorGroup
from rlhf_ray.actors.host_memory import give_back, host_bytes
from rlhf_ray.actors.policy import PolicyGroup, PolicyWorker
from rlhf_ray.actors.rollout import RolloutWorker
from rlhf_ray.actors.watched import Watched
from rlhf_ray.config.algorithm import PPO
from rlhf_ray.config.training import Dtype, Policy
from rlhf_ray.data.trajectory import Trajectory, TrajectoryBatch
from rlhf_ray.engines.training import DTYPES
from rlhf_ray.models.responses import ResponsePack
from rlhf_ray.platform import platform, synchronize
from rlhf_ray.telemetry.trace import SpanRecorder

_PEAK_SECONDS = 0.7


@dataclass(frozen=True)
class Samples:
    """Samples of one micro-batch, all of the same lengths."""

    count: int
    prompt: int
    response: int

    def batch(self, vocabulary: int) -> TrajectoryBatch:
        """Random tokens."""
        random = np.random.default_rng(0)
        tokens = random.integers(0, vocabulary, (self.count, self.prompt + self.response))
        return TrajectoryBatch.of(
            [
                Trajectory(
                    uid=f"random-{number}",
                    sample_index=0,
                    seed=number,
                    prompt_tokens=row[: self.prompt].tolist(),
                    response_tokens=row[self.prompt :].tolist(),
                    engine_logprobs=[0.0] * self.response,
                    weight_versions=[0] * self.response,
                    finish_reason="length",
                )
                for number, row in enumerate(tokens)
            ]
        )


@dataclass(frozen=True)
class PassTimes:
    """Mean seconds of the passes over one micro-batch.

    Attributes:
        scoring: forward, without gradients.
        training: forward and backward.
        step: the optimizer step after it.
    """

    scoring: float
    training: float
    step: float


class ProbeWorker(PolicyWorker):
    """A rank of the policy that is its own clock."""

    def peak_flops(self, dtype: Dtype, size: int) -> float:
        """Operations a second of the best product of square matrices."""
        a, b = (torch.randn(size, size, device=platform().device).to(DTYPES[dtype]) for _ in range(2))
        return 2 * size**3 / min(_timed(lambda: torch.mm(a, b), _PEAK_SECONDS))

    def memory_bandwidth(self, size: int) -> float:
        """Bytes a second of a copy of `size` bytes, those read and those written."""
        source = torch.zeros(size, dtype=torch.uint8, device=platform().device)
        target = torch.empty_like(source)
        return 2 * size / min(_timed(lambda: target.copy_(source), _PEAK_SECONDS))

    def replace_model(self, policy: Policy) -> float:
        """Load a model in place of the one before; seconds of it."""
        self.engine = None  # type: ignore[assignment]
        gc.collect()
        began = time.perf_counter()
        self.load_model(policy, PPO(), 1.0, 1, "merged")
        return time.perf_counter() - began

    def time_passes(self, samples: Samples, vocabulary: int, repeats: int) -> PassTimes:
        """The passes of an update over these samples as one micro-batch, after a warm-up."""
        pack = ResponsePack.of(samples.batch(vocabulary), range(samples.count), platform().device)
        rows: list[tuple[float, float, float]] = []
        for _ in range(repeats + 1):
            clock = _Clock()
            with torch.no_grad():
                self.engine(pack.packed, pack.positions, pack.targets, 1.0, "nothing")
            scoring = clock.lap()
            logprobs, entropy = self.engine(pack.packed, pack.positions, pack.targets, 1.0)
            self.engine.backward((logprobs.sum() + 0 * entropy.sum()) / len(logprobs), last=True)
            training = clock.lap()
            self.engine.step()
            rows.append((scoring, training, clock.lap()))
        return PassTimes(*(mean(column) for column in zip(*rows[1:], strict=True)))

    def memory(self) -> int:
        """Bytes of host memory of this process, as `host_bytes` counts them, without any that it has freed."""
        gc.collect()
        give_back()
        return host_bytes()

    def length(self, data: list[ray.ObjectRef]) -> int:
        """Fetch an object."""
        return len(ray.get(data[0], timeout=60))

    def nothing(self) -> None:
        """A call that does nothing."""


class ProbeRolloutWorker(RolloutWorker):
    """A rollout engine that knows its size."""

    async def memory(self) -> int:
        """Bytes of host memory of all processes of the engine, as `host_bytes` counts them."""
        return host_bytes()


class PairWorker(Watched):
    """One of two processes that talk as ranks of a role do."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.recorder = SpanRecorder()

    def join(self, host: str, port: int, timeout_s: float) -> None:
        """Meet the other."""
        dist.init_process_group(
            platform().collectives,
            init_method=f"tcp://{host}:{port}",
            rank=self.rank,
            world_size=2,
            timeout=timedelta(seconds=timeout_s),
        )

    def time_collectives(self, size: int, repeats: int) -> dict[str, float]:
        """Least seconds of each operation on `size` bytes of bfloat16, and of a sum over one number (`call`)."""
        whole = torch.zeros(size // 2, dtype=torch.bfloat16, device=platform().device)
        half = torch.empty(size // 4, dtype=torch.bfloat16, device=platform().device)
        one = torch.zeros(1, device=platform().device)
        operations: dict[str, Callable[[], object]] = {
            "broadcast": lambda: dist.broadcast(whole, 0),
            "all_reduce": lambda: dist.all_reduce(whole),
            "all_gather": lambda: dist.all_gather_into_tensor(whole, half),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(half, whole),
            "call": lambda: dist.all_reduce(one),
        }
        found = {}
        for name, operation in operations.items():
            seconds = []
            for _ in range(repeats + 1):
                dist.barrier()
                clock = _Clock()
                operation()
                seconds.append(clock.lap())
            found[name] = min(seconds[1:])
        return found


ProbeGroup = PolicyGroup[ProbeWorker]
PairGroup = ActorGroup[PairWorker]


class _Clock:
    """Seconds between laps, the device's work included."""

    def __init__(self) -> None:
        synchronize()
        self._last = time.perf_counter()

    def lap(self) -> float:
        synchronize()
        before, self._last = self._last, time.perf_counter()
        return self._last - before


def _timed(work: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each repetition after a warm-up, for about so long."""
    work()
    clock, laps = _Clock(), list[float]()
    while sum(laps) < seconds:
        work()
        laps.append(clock.lap())
    return laps
