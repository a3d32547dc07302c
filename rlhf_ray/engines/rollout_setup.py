"""What a rollout engine is started with. It travels to the engine's actor, so it imports no vLLM."""

from dataclasses import dataclass
from typing import Literal

from rlhf_ray.config.rollout import RolloutEngine


@dataclass(frozen=True)
class EngineNode:
    """One of the nodes that an engine's workers are divided among.

    Attributes:
        rank: of the node; node 0 leads.
        count: how many there are.
        host, port: where the leading node waits for the others.
    """

    rank: int
    count: int
    host: str
    port: int


@dataclass(frozen=True)
class RolloutSetup:
    """One vLLM engine.

    Attributes:
        model: folder or hub name.
        engine: section of the config.
        dtype: of weights and computing.
        tensor_parallel: workers over which the weights are split.
        adapter_rank: of the adapters that the policy will send; None where it sends whole weights.
        beside_policy: its workers sit on the policy's devices, from which weights come without a network.
        sleep: what it does for roles that share its devices: nothing (0); leave its weights in host memory (1), which
            adapters need; or drop them (2), as new ones come before it generates again.
    """

    model: str
    engine: RolloutEngine
    dtype: str
    tensor_parallel: int
    seed: int
    trust_remote_code: bool = False
    adapter_rank: int | None = None
    beside_policy: bool = False
    sleep: Literal[0, 1, 2] = 0
