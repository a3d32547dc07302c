"""The actors of a PPO run without their models: they sleep for as long as the work would take.

They have those methods of the real workers that a controller calls, and their arguments
(`tests/benchmarks/test_simulated_workers.py` compares them), fetch what the real ones fetch, and return columns of the
same sizes, full of zeros. Nothing here imports torch.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.simulation import records
from benchmarks.simulation.pace import Pace
from benchmarks.simulation.records import MadeThere
from rlhf_ray.actors.shards import ScoredColumns, ShardFacts
from rlhf_ray.actors.waiting import fetch_data
from rlhf_ray.config.rollout import Sampling
from rlhf_ray.data.columns import ColumnPart, Columns, TrainingShard
from rlhf_ray.data.minibatches import OptimizerStep
from rlhf_ray.data.prompt_rows import PromptRows
from rlhf_ray.data.requests import PromptRequest
from rlhf_ray.data.trajectory import Floats, TrajectoryBatch, offsets_of
from rlhf_ray.telemetry.trace import Span, SpanRecorder


class _Actor:
    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.recorder = SpanRecorder()

    def keep(self, pace: Pace) -> None:
        """Work at this pace from here on."""
        self.pace = pace


class SimulatedRank(_Actor):
    """One rank of a role."""

    def drain_spans(self) -> list[Span]:
        """What this rank did since the last call."""
        return self.recorder.drain()

    @contextmanager
    def _work(self, name: str, seconds: float) -> Iterator[None]:
        """A span that lasts as long as the work, and the body at least."""
        with self.recorder.span(name):
            began = time.perf_counter()
            yield
            time.sleep(max(0.0, seconds - (time.perf_counter() - began)))

    def _forward(self, name: str, batch: TrajectoryBatch, index: int, count: int) -> ColumnPart:
        """A pass over a part of a shard."""
        mine = range(index, len(batch), count)
        tokens = int(batch.prompt_lengths[mine].sum() + batch.response_lengths[mine].sum())
        with self._work(name, tokens * self.pace.forward_s):
            return ColumnPart(tuple(mine), np.zeros(int(batch.response_lengths[mine].sum()), np.float32))


class SimulatedTrainedRank(SimulatedRank):
    """A rank of policy or critic."""

    statistics: tuple[str, ...]

    def optimize(
        self,
        shards: Sequence[ray.ObjectRef],
        starts: Sequence[int],
        plan: Sequence[OptimizerStep],
        advantages: Floats | None = None,
    ) -> MadeThere:
        """Fetch all shards, as the real ranks do, and take the steps of the plan."""
        began = time.perf_counter()
        data: list[TrainingShard] = fetch_data(shards, "samples to train on")
        lengths = np.concatenate([shard.batch.prompt_lengths + shard.batch.response_lengths for shard in data])
        mine = [sample for step in plan for micro_batch in step.micro_batches for sample in micro_batch]
        with self._work("update", float(lengths[mine].sum()) * self.pace.update_s):
            pass
        return MadeThere(records.update_report, self.statistics, len(plan), len(mine), time.perf_counter() - began)

    def save(self, folder: str) -> None:
        """Write a file for this rank's part of a checkpoint."""
        with self._work("checkpoint", 0.0):
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / f"rank{self.rank}").write_bytes(b"")


class SimulatedPolicy(SimulatedTrainedRank):
    """One rank of the policy."""

    statistics = ("loss", "clip_fraction", "approx_kl", "entropy", "grad_norm")

    def connect(
        self,
        engines: list[Any],
        workers_per_engine: int,
        host: str,
        port: int,
        bucket_bytes: int,
        timeout_s: float,
        same_devices: bool = False,
    ) -> None:
        """Meet the rollout engines; rank 0 sends."""
        self._engines, self._timeout_s = engines, timeout_s

    def logprobs(self, batch: TrajectoryBatch, index: int = 0, count: int = 1) -> ColumnPart:
        """Log-probs of a part of the responses."""
        return self._forward("log-probs", batch, index, count)

    def update(self, shards: Any, starts: Any, plan: Any, advantages: Any, whitening: Any) -> MadeThere:
        """The optimizer steps of a batch."""
        return self.optimize(shards, starts, plan, advantages)

    def send_weights(self, version: int) -> None:
        """Give every engine the version."""
        with self._work("send weights", self.pace.sync_s):
            if self.rank == 0:
                for method, args in (("start_update", ()), ("update", ({},)), ("finish_update", (version,))):
                    answers = [getattr(engine, method).remote(*args) for engine in self._engines]
                    ray.get(answers, timeout=self._timeout_s)


class SimulatedCritic(SimulatedTrainedRank):
    """One rank of the critic."""

    statistics = ("loss", "clip_fraction", "grad_norm")

    def values(self, batch: TrajectoryBatch, index: int = 0, count: int = 1) -> ColumnPart:
        """Values of a part of the responses."""
        return self._forward("values", batch, index, count)

    def make_training_shard(
        self, scored: ScoredColumns, scores: Floats, kl_coef: float
    ) -> tuple[TrainingShard, MadeThere]:
        """Fetch shards and all parts of their columns, and return what is trained on."""
        batch = TrajectoryBatch.concat(fetch_data(scored.trajectories, "shards"))
        for column in (scored.old_logprobs, scored.reference_logprobs, scored.values or ()):
            for parts in column:
                fetch_data(parts, "columns of a shard")
        tokens = len(batch.response_tokens)
        with self._work("advantages", 0.0):
            old, values, advantages, returns = (np.zeros(tokens, np.float32) for _ in range(4))
            columns = Columns(old_logprobs=old, values=values, advantages=advantages, returns=returns)
        report = MadeThere(records.training_shard_report, tokens, np.zeros(len(batch), np.float32))
        return TrainingShard(batch, columns), report

    def update(self, shards: Any, starts: Any, plan: Any) -> MadeThere:
        """The optimizer steps of a batch."""
        return self.optimize(shards, starts, plan)


class SimulatedReference(SimulatedRank):
    """One rank of the reference."""

    def logprobs(self, batch: TrajectoryBatch, index: int = 0, count: int = 1) -> ColumnPart:
        """Log-probs of a part of the responses."""
        return self._forward("log-probs", batch, index, count)


class SimulatedRewardModel(SimulatedRank):
    """One rank of a reward model."""

    def score(self, batch: TrajectoryBatch, index: int = 0, count: int = 1) -> MadeThere:
        """Scores of a part of the samples."""
        found = self._forward("score", batch, index, count)
        return MadeThere(records.score_part, found.samples, np.zeros(len(found.samples), np.float32))


class SimulatedEngine(_Actor):
    """One rollout engine. Responses are half to one and a half times as long as the mean, which is two thirds of
    `max_new_tokens`."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self._version = 0
        self._decoding = 0
        self._freed = asyncio.Condition()

    async def generate(
        self, prompts: Sequence[PromptRequest], sampling: Sampling, version: int
    ) -> tuple[TrajectoryBatch, ShardFacts]:
        """Sample one shard; it waits until the engine has room for all of it."""
        batch = _responses(prompts, sampling.max_new_tokens, self._version)
        with self.recorder.span("generate"):
            async with self._freed:
                await self._freed.wait_for(
                    lambda: not self._decoding or self._decoding + len(batch) <= self.pace.sequences
                )
                self._decoding += len(batch)
            await asyncio.sleep(int(batch.response_lengths.max()) * self.pace.token_s)
            async with self._freed:
                self._decoding -= len(batch)
                self._freed.notify_all()
        return batch, ShardFacts.of(batch, version)

    def keep(self, pace: Pace) -> None:
        """Be an engine of a new run."""
        super().keep(pace)
        self._version = 0

    async def start_update(self) -> None:
        """Pause."""

    async def update(self, update_info: dict[str, Any]) -> None:
        """Receive weights."""

    async def finish_update(self, version: int) -> None:
        """Go on with the new weights."""
        self._version = version

    def drain_spans(self) -> list[Span]:
        """What this engine did since the last call."""
        return self.recorder.drain()


def _responses(prompts: Sequence[PromptRequest], max_new_tokens: int, version: int) -> TrajectoryBatch:
    random = np.random.default_rng(prompts[0].seed)
    lengths = random.integers(max_new_tokens // 3, max_new_tokens + 1, len(prompts))
    tokens = int(lengths.sum())
    return TrajectoryBatch(
        uids=tuple(prompt.uid for prompt in prompts),
        sample_index=np.array([prompt.sample_index for prompt in prompts], np.int32),
        seeds=np.array([prompt.seed for prompt in prompts], np.int64),
        prompt_tokens=np.concatenate([prompt.tokens for prompt in prompts]),
        prompt_offsets=offsets_of([len(prompt.tokens) for prompt in prompts]),
        response_tokens=np.zeros(tokens, np.int32),
        response_offsets=offsets_of(lengths),
        engine_logprobs=np.zeros(tokens, np.float32),
        weight_versions=np.full(tokens, version, np.int32),
        truncated=lengths == max_new_tokens,
        loss_mask=np.ones(tokens, np.bool_),
        rows=PromptRows.of([prompt.row for prompt in prompts]),
    )
