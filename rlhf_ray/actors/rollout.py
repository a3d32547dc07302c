"""The rollout engines, and which of them gets the next shard of prompts."""

import asyncio
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from numpy.typing import NDArray

from rlhf_ray.actors.address import own_address
from rlhf_ray.actors.group import ActorGroup
from rlhf_ray.actors.waiting import fetch, settle, wait_any
from rlhf_ray.actors.watched import Watched
from rlhf_ray.config.rollout import Rollout, Sampling
from rlhf_ray.data.requests import PromptRequest
from rlhf_ray.data.trajectory import TrajectoryBatch
from rlhf_ray.engines.level import Level
from rlhf_ray.engines.rollout_setup import EnginePart, RolloutSetup
from rlhf_ray.telemetry.status import Shards
from rlhf_ray.telemetry.trace import Span, SpanRecorder

if TYPE_CHECKING:  # torch is imported with vLLM, when the engine starts
    from rlhf_ray.engines.engine_metrics import EngineLoad
    from rlhf_ray.models.lora import Adapter


@dataclass(frozen=True)
class ShardFacts:
    """What the controller knows of a shard: numbers per sample, no tokens.

    Attributes:
        uids: `[samples]`.
        sample_index: `[samples]`.
        prompt_lengths, response_lengths: tokens, int64 `[samples]`.
        truncated: bool `[samples]`.
        version_lag: sum over response tokens of versions that the sampling weights were behind the newest.
    """

    uids: tuple[str, ...]
    sample_index: NDArray[np.int32]
    prompt_lengths: NDArray[np.int64]
    response_lengths: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    version_lag: int

    @classmethod
    def of(cls, batch: TrajectoryBatch, version: int) -> "ShardFacts":
        """Of a shard; `version` is the newest of the policy."""
        return cls(
            batch.uids,
            batch.sample_index,
            batch.prompt_lengths,
            batch.response_lengths,
            batch.truncated,
            int((version - batch.weight_versions).sum()),
        )


class RolloutWorker(Watched):
    """One vLLM engine in an actor. Its methods run side by side in one event loop."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.recorder = SpanRecorder()
        self.engine: Any = None  # vLLM is imported when the engine starts
        self._load: EngineLoad | None = None
        self._version = 0

    async def address(self) -> tuple[str, int]:
        """Address of this node and a free port on it."""
        return own_address()

    async def load_model(self, setup: RolloutSetup, part: EnginePart | None = None) -> None:
        """Start the engine, or that part of its workers which sits here."""
        with self.recorder.span("load model"):
            from rlhf_ray.engines.interfaces import use_interface_of
            from rlhf_ray.engines.rollout import RolloutEngine, RolloutFollower

            host = ray.util.get_node_ip_address()
            use_interface_of(host)
            os.environ["VLLM_HOST_IP"] = host
            if part is not None and part.number > 0:
                self.engine = await asyncio.to_thread(RolloutFollower, setup, part)
                return
            self.engine = RolloutEngine(setup, part)
            self._load = self.engine.load
            await self.engine.set_version(0)

    async def generate(
        self, prompts: Sequence[PromptRequest], sampling: Sampling, version: int
    ) -> tuple[TrajectoryBatch, ShardFacts]:
        """Sample one shard. `version` is the newest of the policy."""
        with self.recorder.span("generate"):
            batch = TrajectoryBatch.of(await self.engine.generate(prompts, sampling))
        return batch, ShardFacts.of(batch, version)

    async def hold(self) -> None:
        """Queue prompts without generating."""
        await self.engine.pause()

    async def release(self, prompts: int, timeout_s: float) -> None:
        """Generate, once this many prompts have been queued since the last release."""
        async with asyncio.timeout(timeout_s):
            while self.engine.queued < prompts:  # each turn lets the calls run that queue prompts
                await asyncio.sleep(0)
        self.engine.queued = 0
        await self.engine.resume()

    async def move(self, level: Level) -> None:
        """Leave the device to others, or come back to it, as far as `level` says."""
        with self.recorder.span(f"going to {level.name.lower()}"):
            await self.engine.move(level)

    async def init_transfer(self, init_info: dict[str, Any]) -> None:
        """Join the trainer's weight-transfer group."""
        await self.engine.init_transfer(init_info)

    async def start_update(self) -> None:
        """Pause and make ready for new weights."""
        await self.engine.pause()
        await self.engine.start_update()

    async def update(self, update_info: dict[str, Any]) -> None:
        """Receive weights."""
        with self.recorder.span("receive weights"):
            await self.engine.update(update_info)

    async def finish_update(self, version: int) -> None:
        """Go on with the new weights."""
        await self.engine.finish_update(version)
        self._version = version
        await self.engine.resume()

    async def load_adapter(self, adapter: "Adapter", version: int) -> None:
        """Pause, take an adapter in place of the one before, and go on with it."""
        await self.engine.pause()
        with self.recorder.span("receive adapter"):
            await self.engine.load_adapter(adapter)
        await self.engine.set_version(version)
        self._version = version
        await self.engine.resume()

    async def version(self) -> int:
        """Version of the weights in use."""
        return await self.engine.version()

    async def drain_spans(self) -> list[Span]:
        """What this engine did since the last call."""
        return self.recorder.drain()

    def find_lost_process(self) -> str | None:
        """A process of the engine."""
        return None if self.engine is None else self.engine.find_lost_process()

    def queue(self) -> tuple[int | None, int | None, int | None]:
        """Running and waiting requests, and the version of the weights; None until the engine is up, and where only a
        part of its workers sits."""
        if self._load is None:
            return None, None, None
        return self._load.running, self._load.waiting, self._version

    def device_bytes(self) -> tuple[int, int] | None:
        """Device memory in use and in all; None on CPU, and until torch is imported, with the engine."""
        if self.engine is None:
            return None
        from rlhf_ray.platform import device_memory

        return device_memory()

    async def shutdown(self) -> None:
        """End the engine's processes."""
        if self.engine is not None:
            self.engine.shutdown()


@dataclass(frozen=True)
class GeneratedShard:
    """A shard that is complete.

    Attributes:
        number: of the shard within the step.
        shards: of the step.
        trajectories: reference to its `TrajectoryBatch`.
        facts: its numbers per sample.
    """

    number: int
    shards: int
    trajectories: ray.ObjectRef
    facts: ShardFacts


class LoadBalancer:
    """Hands shards to the engine with the least outstanding tokens, and no more than engines can work on.

    Args:
        engines: how many there are.
        capacity: samples that one engine may have at a time; a shard always goes to an idle engine.
    """

    def __init__(self, engines: int, capacity: int) -> None:
        self._tokens = [0] * engines
        self._samples = [0] * engines
        self._capacity = capacity

    def place(self, tokens: int, samples: int) -> int | None:
        """The engine that takes a shard of so many expected tokens, None when all are full."""
        free = [e for e, held in enumerate(self._samples) if held == 0 or held + samples <= self._capacity]
        if not free:
            return None
        engine = min(free, key=lambda e: (self._tokens[e], e))
        self._tokens[engine] += tokens
        self._samples[engine] += samples
        return engine

    def done(self, engine: int, tokens: int, samples: int) -> None:
        """A shard came back from `engine`."""
        self._tokens[engine] -= tokens
        self._samples[engine] -= samples


class RolloutGroup(ActorGroup):
    """All rollout engines: calls go to the actors that lead them.

    Args:
        actors: those of each engine, one after the other; of an engine in several parts the first one leads.
        parts: of each engine.

    Attributes:
        shards: counts of those that `generate` was last given.
    """

    def __init__(
        self, actors: Sequence[Any], rollout: Rollout, *, deterministic: bool, timeout_s: float, parts: int = 1
    ) -> None:
        super().__init__("rollout", actors[::parts])
        self._all = ActorGroup("rollout", actors)
        self._parts = parts
        self._rollout = rollout
        self._deterministic = deterministic
        self._timeout_s = timeout_s
        self.shards = Shards()

    def start_engines(self, setup: RolloutSetup, timeout_s: float) -> list[ray.ObjectRef]:
        """Have every actor start its engine, or its part of one."""
        if self._parts == 1:
            return self.call("load_model", setup)
        addresses = self.run("address", timeout_s=timeout_s, setting="run.timeouts.setup_s")
        parts = [EnginePart(n, self._parts, host, port) for host, port in addresses for n in range(self._parts)]
        return self._all.call_each("load_model", [(setup, part) for part in parts])

    def end_engines(self, timeout_s: float) -> list[str]:
        """Have the engines end their own processes, which outlive an actor that is killed; why some did not, in words.

        All are waited for, as one that is dead already must not keep the others from ending.
        """
        return settle(self._all.call("shutdown"), timeout_s)

    @property
    def processes(self) -> list[Any]:
        """All actors, those that lead no engine too."""
        return self._all.actors

    def kill(self) -> None:
        """End the processes of all parts."""
        self._all.kill()

    def generate(
        self, shards: Sequence[Sequence[PromptRequest]], version: int, sampling: Sampling | None = None
    ) -> Iterator[GeneratedShard]:
        """Sample all shards and yield each when it is complete.

        Deterministic runs give shards to engines by number and start generation once all are queued, so that
        engines see the same batches each time.

        Raises:
            RoleTimeout, ActorDied, TaskFailed: as `wait_all`.
        """
        sampling = sampling or self._rollout.sampling
        if self._deterministic:
            yield from self._generate_all_at_once(shards, version, sampling)
        else:
            yield from self._generate_balanced(shards, version, sampling)

    def _generate_balanced(
        self, shards: Sequence[Sequence[PromptRequest]], version: int, sampling: Sampling
    ) -> Iterator[GeneratedShard]:
        # Twice what an engine decodes at a time, so that it never runs dry between shards.
        balancer = LoadBalancer(len(self), 2 * self._rollout.engine.max_num_seqs)
        loads = [sum(len(p.tokens) + sampling.max_new_tokens for p in shard) for shard in shards]
        running: dict[ray.ObjectRef, tuple[int, int, ray.ObjectRef]] = {}
        waiting = list(range(len(shards)))[::-1]
        while waiting or running:
            while waiting and (engine := balancer.place(loads[waiting[-1]], len(shards[waiting[-1]]))) is not None:
                number = waiting.pop()
                trajectories, facts = self.call_one(
                    engine, "generate", shards[number], sampling, version, num_returns=2
                )
                running[facts] = (number, engine, trajectories)
            self._count(len(shards), len(waiting), len(running))
            facts, (number, engine, trajectories) = self._next(running)
            self._count(len(shards), len(waiting), len(running))
            balancer.done(engine, loads[number], len(shards[number]))
            yield GeneratedShard(number, len(shards), trajectories, facts)

    def _generate_all_at_once(
        self, shards: Sequence[Sequence[PromptRequest]], version: int, sampling: Sampling
    ) -> Iterator[GeneratedShard]:
        self.run("hold", timeout_s=self._timeout_s, setting="run.timeouts.rollout_s")
        running: dict[ray.ObjectRef, tuple[int, int, ray.ObjectRef]] = {}
        queued = [0] * len(self)
        for number, shard in enumerate(shards):
            engine = number % len(self)
            queued[engine] += len(shard)
            trajectories, facts = self.call_one(engine, "generate", shard, sampling, version, num_returns=2)
            running[facts] = (number, engine, trajectories)
        released = set(self.call_each("release", [(count, self._timeout_s) for count in queued]))
        self._count(len(shards), 0, len(running))
        while running:
            # Both are waited for: where a prompt fails, its engine may never have all that it is to be released with.
            facts, (number, _, trajectories) = self._next(running, released)
            self._count(len(shards), 0, len(running))
            yield GeneratedShard(number, len(shards), trajectories, facts)

    def _count(self, shards: int, waiting: int, generating: int) -> None:
        self.shards = Shards(waiting, generating, shards - waiting - generating)

    def _next(
        self, running: dict[ray.ObjectRef, tuple[int, int, ray.ObjectRef]], released: set[ray.ObjectRef] | None = None
    ) -> tuple[ShardFacts, tuple[int, int, ray.ObjectRef]]:
        releases = released or set()
        while True:
            done = wait_any([*releases, *running], self._timeout_s, "rollout: generate", "run.timeouts.rollout_s")
            if done in running:
                break
            releases.remove(done)
            fetch(done, "rollout: release")
        entry = running.pop(done)
        return fetch(done, f"rollout/{entry[1]}: generate"), entry
