"""The rollout engines, and which of them gets the next shard of prompts."""

import asyncio
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import ray

from rlhf_ray.actors.address import own_address
from rlhf_ray.actors.group import ActorGroup, Calls
from rlhf_ray.actors.shards import GeneratedShard, ShardFacts
from rlhf_ray.actors.waiting import fetch, settle, wait_any
from rlhf_ray.actors.watched import Watched, beside_work
from rlhf_ray.config.roles import Level
from rlhf_ray.config.rollout import Rollout, Sampling
from rlhf_ray.config.run import Timeouts
from rlhf_ray.data.requests import PromptRequest
from rlhf_ray.data.trajectory import TrajectoryBatch
from rlhf_ray.engines.rollout_setup import EngineNode, RolloutSetup
from rlhf_ray.telemetry.status import Shards
from rlhf_ray.telemetry.trace import SpanRecorder

if TYPE_CHECKING:  # torch is imported with vLLM, when the engine starts
    from rlhf_ray.engines.engine_metrics import EngineLoad
    from rlhf_ray.models.lora import Adapter

_KILL_S = 5.0


class RolloutWorker(Watched):
    """One vLLM engine in an actor. Its methods run side by side in one event loop."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.recorder = SpanRecorder()
        self.engine: Any = None  # vLLM is imported when the engine starts
        self._load: EngineLoad | None = None

    async def address(self) -> tuple[str, int]:
        """Address of this node and a free port on it."""
        return own_address()

    async def load_model(self, setup: RolloutSetup, node: EngineNode | None = None) -> None:
        """Start the engine, or that part of its workers which sits here."""
        with self.recorder.span("load model"):
            from rlhf_ray.engines.interfaces import use_interface_of
            from rlhf_ray.engines.rollout import RolloutEngine, RolloutFollower

            host = ray.util.get_node_ip_address()
            use_interface_of(host)
            os.environ["VLLM_HOST_IP"] = host
            if node is not None and node.rank > 0:
                self.engine = await asyncio.to_thread(RolloutFollower, setup, node)
                return
            self.engine = RolloutEngine(setup, node)
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
        await self.engine.resume()

    async def load_adapter(self, adapter: "Adapter", version: int) -> None:
        """Pause, take an adapter in place of the one before, and go on with it."""
        await self.engine.pause()
        with self.recorder.span("receive adapter"):
            await self.engine.load_adapter(adapter)
        await self.engine.set_version(version)
        await self.engine.resume()

    async def version(self) -> int | None:
        """Version of the weights in use; None where the engine has none."""
        version: int | None = await self.engine.version()
        return version

    def find_lost_process(self) -> str | None:
        """A process of the engine."""
        return None if self.engine is None else self.engine.find_lost_process()

    def queue(self) -> tuple[int | None, int | None, int | None]:
        """Running and waiting requests, and the version of the weights, which is None while it has none; all are None
        until the engine is up, and where only some of its workers sit."""
        if self._load is None:
            return None, None, None
        return self._load.running, self._load.waiting, self.engine.held.version

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

    @beside_work
    def kill_processes(self) -> None:
        """Kill the engine's processes: one that is still starting does not hear of `shutdown`."""
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()


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
        self.take(engine, tokens, samples)
        return engine

    def take(self, engine: int, tokens: int, samples: int) -> None:
        """A shard goes to `engine`."""
        self._tokens[engine] += tokens
        self._samples[engine] += samples

    def done(self, engine: int, tokens: int, samples: int) -> None:
        """A shard came back from `engine`."""
        self._tokens[engine] -= tokens
        self._samples[engine] -= samples


@dataclass
class _Queued:
    """A shard that waits for an engine, or is with one."""

    number: int
    shards: int
    requests: Sequence[PromptRequest]
    sampling: Sampling
    version: int
    engine: int = 0

    @property
    def tokens(self) -> int:
        """At most."""
        return sum(len(request.tokens) + self.sampling.max_new_tokens for request in self.requests)


class RolloutGroup(ActorGroup[RolloutWorker]):
    """All rollout engines: calls go to the actors that lead them.

    Args:
        actors: those of each engine, one after the other; where an engine sits on several nodes the first one leads.
        nodes_per_engine: actors of each engine.

    Attributes:
        shards: counts of those that were submitted since all were complete last.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        rollout: Rollout,
        *,
        deterministic: bool,
        timeouts: Timeouts,
        nodes_per_engine: int = 1,
    ) -> None:
        super().__init__("rollout", actors[::nodes_per_engine])
        self._all = ActorGroup[RolloutWorker]("rollout", actors, nodes_per_engine)
        self._nodes_per_engine = nodes_per_engine
        self._rollout = rollout
        self._deterministic = deterministic
        self._timeouts = timeouts
        # Twice what an engine decodes at a time, so that it never runs dry between shards.
        self._balancer = LoadBalancer(len(self), 2 * rollout.engine.max_num_seqs)
        self._waiting: deque[_Queued] = deque()
        self._running: dict[ray.ObjectRef, tuple[_Queued, ray.ObjectRef]] = {}
        self._released: list[ray.ObjectRef] = []
        self._generated = 0
        self.shards = Shards()

    def load_model(self, setup: RolloutSetup) -> Calls[None]:
        """Have every actor start its engine, or its node's part of one."""
        if self._nodes_per_engine == 1:
            return self.call(RolloutWorker.load_model, setup)
        count = self._nodes_per_engine
        addresses = self.call(RolloutWorker.address).wait(self._timeouts.setup)
        nodes = [EngineNode(n, count, host, port) for host, port in addresses for n in range(count)]
        refs = [actor.load_model.remote(setup, node) for actor, node in zip(self._all.actors, nodes, strict=True)]
        return Calls(refs, "rollout: load_model")

    def end_engines(self, timeout_s: float) -> list[str]:
        """Have the engines end their own processes, which outlive an actor that is killed; why some did not, in words.

        All are waited for, as one that is dead already must not keep the others from ending. The processes of those
        that take longer are killed.
        """
        ending = self._all.call(RolloutWorker.shutdown).refs
        errors = settle(ending, timeout_s)
        _, busy = ray.wait(ending, num_returns=len(ending), timeout=0)
        stuck = [actor for actor, call in zip(self._all.actors, ending, strict=True) if call in busy]
        return errors + settle([actor.kill_processes.remote() for actor in stuck], _KILL_S)

    @property
    def processes(self) -> list[Any]:
        """All actors, those that lead no engine too."""
        return self._all.actors

    def kill(self) -> None:
        """End the processes of all nodes."""
        self._all.kill()

    def move(self, level: Level) -> Calls[None]:
        """Have all engines leave their devices, or come back to them."""
        return self.call(RolloutWorker.move, level)

    def hold(self) -> Calls[None]:
        """Have engines queue prompts without generating."""
        return self.call(RolloutWorker.hold)

    def release(self, counts: Sequence[int]) -> Calls[None]:
        """Have each engine generate, once this many prompts have been queued since the last release."""
        return self.call_each(RolloutWorker.release, [(count, self._timeouts.rollout_s) for count in counts])

    def versions(self) -> Calls[int | None]:
        """Version of the weights that each engine uses; None where it has none."""
        return self.call(RolloutWorker.version)

    def generate(
        self, shards: Sequence[Sequence[PromptRequest]], version: int, sampling: Sampling | None = None
    ) -> Iterator[GeneratedShard]:
        """Sample all shards and yield each when it is complete. Raises as `completed`."""
        self.submit(shards, version, sampling)
        yield from self.completed()

    def submit(self, shards: Sequence[Sequence[PromptRequest]], version: int, sampling: Sampling | None = None) -> None:
        """Queue shards of requests. `version` is the newest of the policy.

        Engines begin at once, except for those of a deterministic run: it gives shards to engines by number and starts
        generation once all are queued, so that engines see the same batches each time.
        """
        sampling = sampling or self._rollout.sampling
        if not self._waiting and not self._running:
            self._generated = 0
        queued = [_Queued(number, len(shards), requests, sampling, version) for number, requests in enumerate(shards)]
        if self._deterministic:
            self._queue_all_at_once(queued)
        else:
            self._waiting.extend(queued)
            self._dispatch()
        self._count()

    def completed(self) -> Iterator[GeneratedShard]:
        """Each shard when it is complete, until none is left.

        Raises:
            RoleTimeout, ActorDied, TaskFailed: as `wait_all`. All other shards are given up then.
        """
        while self._waiting or self._running:
            try:
                facts, queued, trajectories = self._next()
            except Exception:
                self._give_up()
                raise
            self._dispatch()
            self._count()
            yield GeneratedShard(queued.number, queued.shards, trajectories, facts)

    def _dispatch(self) -> None:
        """Give waiting shards to engines that have room."""
        while self._waiting:
            queued = self._waiting[0]
            engine = self._balancer.place(queued.tokens, len(queued.requests))
            if engine is None:
                return
            self._start(self._waiting.popleft(), engine)

    def _queue_all_at_once(self, shards: Sequence[_Queued]) -> None:
        self.hold().wait(self._timeouts.rollout)
        counts = [0] * len(self)
        for queued in shards:
            engine = queued.number % len(self)
            counts[engine] += len(queued.requests)
            self._balancer.take(engine, queued.tokens, len(queued.requests))
            self._start(queued, engine)
        self._released = self.release(counts).refs

    def _start(self, queued: _Queued, engine: int) -> None:
        queued.engine = engine
        trajectories, facts = self.call_rank_for_two(
            engine, RolloutWorker.generate, queued.requests, queued.sampling, queued.version
        )
        self._running[facts] = (queued, trajectories)

    def _next(self) -> tuple[ShardFacts, _Queued, ray.ObjectRef]:
        limit = self._timeouts.rollout
        while True:
            # Releases are waited for too: where a prompt fails, its engine may never have all that it is to be released
            # with.
            refs = [*self._released, *self._running]
            done = wait_any(refs, limit.seconds, "rollout: generate", limit.setting)
            if done in self._running:
                break
            self._released.remove(done)
            fetch(done, "rollout: release")
        queued, trajectories = self._running.pop(done)
        self._balancer.done(queued.engine, queued.tokens, len(queued.requests))
        facts: ShardFacts = fetch(done, f"rollout/{queued.engine}: generate")
        self._generated += 1
        return facts, queued, trajectories

    def _give_up(self) -> None:
        """Forget all shards, which else would come with those that are submitted next."""
        for queued, _ in self._running.values():
            self._balancer.done(queued.engine, queued.tokens, len(queued.requests))
        self._waiting.clear()
        self._running.clear()
        self._released.clear()
        self._count()

    def _count(self) -> None:
        self.shards = Shards(len(self._waiting), len(self._running), self._generated)
