"""New weights for the rollout engines, as the trainer sends them: all of them, or adapters alone."""

from dataclasses import dataclass
from typing import Any

import ray
from torch import nn

from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.engines.training import full_adapter


class EngineClient:
    """vLLM's `VLLMWeightSyncClient` protocol over the rollout actors.

    Each engine's workers have ranks of their own in the transfer group; vLLM's own Ray client gives all engines the
    same. Engines pause before an update and go on, under the new version, after it.
    """

    def __init__(self, engines: list[Any], workers_per_engine: int, timeout_s: float) -> None:
        self._engines = engines
        self._workers_per_engine = workers_per_engine
        self._timeout_s = timeout_s
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have every engine join."""
        self._each(
            "init_transfer",
            [
                (init_info | {"rank_offset": init_info["rank_offset"] + number * self._workers_per_engine},)
                for number in range(len(self._engines))
            ],
        )

    def start_weight_update(self) -> None:
        """Pause every engine."""
        self._each("start_update", [()] * len(self._engines))

    def update_weights(self, update_info: Any) -> None:
        """Have every engine receive."""
        self._each("update", [(update_info,)] * len(self._engines))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Resume every engine."""
        self._each("finish_update", [(self.version,)] * len(self._engines))

    def _each(self, method: str, arguments: list[tuple[Any, ...]]) -> None:
        refs: list[ray.ObjectRef] = [
            getattr(engine, method).remote(*args) for engine, args in zip(self._engines, arguments, strict=True)
        ]
        wait_all(refs, self._timeout_s, f"rollout: {method}", "run.timeouts.sync_s")


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
        self.sender.send()


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
        refs: list[ray.ObjectRef] = [engine.load_adapter.remote(shared, version) for engine in self.engines]
        wait_all(refs, self.timeout_s, "rollout: load_adapter", "run.timeouts.sync_s")
