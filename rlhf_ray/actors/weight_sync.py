"""New weights for the rollout engines, as the trainer sends them: all of them, or adapters alone."""

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple

import ray
from torch import nn

from rlhf_ray.actors.group import method_of
from rlhf_ray.actors.rollout import RolloutWorker
from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.engines.training import full_adapter

_T = TypeVar("_T")
_Each = TypeVarTuple("_Each")

_CAUSE_S = 10.0
"""How long a failure of the trainer's own side waits for the failure of an engine that may have caused it: a broken
connection is noticed sooner than the death behind it."""


class EngineClient:
    """vLLM's `VLLMWeightSyncClient` protocol over the rollout actors.

    Where a backend numbers all workers, each engine's workers get ranks of their own; vLLM's own Ray client gives all
    engines the same. Engines pause before an update and go on, under the new version, after it.
    """

    def __init__(self, engines: list[Any], workers_per_engine: int, timeout_s: float) -> None:
        self._engines = engines
        self._workers_per_engine = workers_per_engine
        self._timeout_s = timeout_s
        self.version = 0
        self._calling = 0
        self._failed: Future[None] = Future()

    def beside(self, work: Callable[[], _T]) -> _T:
        """Do work of the trainer in which it meets the engines, and raise the error of an engine that fails as soon as
        it does: the work may sit in a collective then, until its own limit, and end in an error that names nothing.

        A thread that is left in a collective ends with the process, which is of no more use.
        """
        done: Future[_T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, daemon=True, name="weight sync").start()
        either: list[Future[Any]] = [done, self._failed]
        wait(either, return_when=FIRST_COMPLETED)
        if done.done() and done.exception() is not None and self._calling:
            wait([self._failed], timeout=_CAUSE_S)
        if self._failed.done():
            self._failed.result()
        return done.result()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have every engine join."""
        self._each(
            RolloutWorker.init_transfer,
            [(self._of_engine(init_info, number),) for number in range(len(self._engines))],
        )

    def _of_engine(self, init_info: dict[str, Any], number: int) -> dict[str, Any]:
        if "rank_offset" not in init_info:  # ipc: each worker finds the memory of its own device
            return init_info
        return init_info | {"rank_offset": init_info["rank_offset"] + number * self._workers_per_engine}

    def start_weight_update(self) -> None:
        """Pause every engine."""
        self._each(RolloutWorker.start_update, [()] * len(self._engines))

    def update_weights(self, update_info: Any) -> None:
        """Have every engine receive."""
        self._each(RolloutWorker.update, [(update_info,)] * len(self._engines))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Resume every engine."""
        self._each(RolloutWorker.finish_update, [(self.version,)] * len(self._engines))

    def _each(self, method: Callable[[RolloutWorker, *_Each], Any], arguments: list[tuple[*_Each]]) -> None:
        self._calling += 1
        try:
            refs: list[ray.ObjectRef] = [
                method_of(engine, method).remote(*args) for engine, args in zip(self._engines, arguments, strict=True)
            ]
            wait_all(refs, self._timeout_s, f"rollout: {method.__name__}", "run.timeouts.sync_s")
        except BaseException as error:
            if not self._failed.done():  # of several failures the first is the cause
                self._failed.set_exception(error)
            raise
        finally:
            self._calling -= 1


@dataclass(frozen=True)
class WeightSync:
    """Sends all weights through vLLM's weight-transfer API.

    Attributes:
        client: the engines.
        sender: a `WeightSender`, with which vLLM is imported.
    """

    client: EngineClient
    sender: Any

    def send(self, version: int) -> None:
        """Give every engine the present weights under the name `version`; collective."""
        self.client.version = version
        self.client.beside(self.sender.send)


@dataclass(frozen=True)
class AdapterSync:
    """Sends adapters through Ray's object store; engines apply them to the base model that they have from the start.

    Attributes:
        model: with adapters.
        rank: of this trainer process; rank 0 sends.
        engines: rollout actors.
        timeout_s: how long a send may take.
    """

    model: nn.Module
    rank: int
    engines: list[Any]
    timeout_s: float

    def send(self, version: int) -> None:
        """Give every engine the present adapters under the name `version`; collective."""
        adapter = full_adapter(self.model)
        if self.rank != 0:
            return
        shared = ray.put(adapter)
        refs: list[ray.ObjectRef] = [
            method_of(engine, RolloutWorker.load_adapter).remote(shared, version) for engine in self.engines
        ]
        wait_all(refs, self.timeout_s, "rollout: load_adapter", "run.timeouts.sync_s")
