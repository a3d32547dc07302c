"""Memory of one worker of a vLLM engine, and how many tokens its KV cache has room for."""

from dataclasses import dataclass

from rlhf_ray.cluster.planner.activations import FLOAT32, INT64, ITEMSIZE
from rlhf_ray.cluster.planner.footprint import Item, always, during
from rlhf_ray.cluster.planner.roles import RolloutRole
from rlhf_ray.cluster.planner.shapes import ModelShape
from rlhf_ray.engines.level import Level

GIB = 2**30

SORTED_LOGIT = 4 * FLOAT32 + INT64
"""Of one logit while vLLM samples: itself, its log-prob, its place in order with top-p, its probability."""


@dataclass(frozen=True)
class EnginePlan:
    """One engine.

    Attributes:
        items: of one worker, without the process itself.
        cached_tokens: that its KV cache has room for.
        wanted_tokens: of all sequences that it decodes at the same time, when they are longest.
        needs: device bytes of one worker, below which it can't start: weights, a pass, one longest sequence.
        allotted: device bytes that one worker may use; None on the CPU, where the KV cache alone is limited.
    """

    items: tuple[Item, ...]
    cached_tokens: int
    wanted_tokens: int
    needs: int
    allotted: int | None

    @property
    def starts(self) -> bool:
        """Whether one sequence fits into its KV cache."""
        return self.cached_tokens > 0


def token_bytes(role: RolloutRole) -> int:
    """Keys and values of one token in one worker. Workers share the heads; with more workers than there are of keys
    and values, several hold the same."""
    shape = role.shape
    heads = max(1, shape.kv_heads // role.placement.tensor_parallel)
    return 2 * shape.layers * heads * shape.head_dim * ITEMSIZE[role.dtype]


def engine_plan(role: RolloutRole, device_memory: int, *, cpu: bool) -> EnginePlan:
    """What one worker of an engine holds.

    Args:
        device_memory: of one device; on the CPU of the node.
    """
    shape, engine, workers = role.shape, role.engine, role.placement.tensor_parallel
    item = ITEMSIZE[role.dtype]
    weights = item * shape.parameters // workers
    adapters = (
        item * role.adapter_rank * sum(sum(tensor.shape) * tensor.count for tensor in shape.tensors() if tensor.linear)
    )
    passing = _pass_bytes(role)
    each = token_bytes(role)
    allotted = None if cpu else int(engine.gpu_memory_utilization * device_memory)
    cache = engine.cpu_kv_cache_gib * GIB if allotted is None else allotted - weights - adapters - passing
    tokens = max(0, cache) // each
    longest = engine.max_model_len
    wanted = min(engine.max_num_seqs, -(-role.batch.samples // role.placement.engines)) * role.batch.longest
    items = (
        always("weights", weights, Level.WEIGHTS),
        always("adapters", adapters, Level.WEIGHTS),
        # A GPU's pass is measured when the engine starts and stays its own.
        always("pass", passing) if not cpu else during("pass", passing, "generate"),
        always("KV cache", max(0, cache)),
        during("sync bucket", sync_bucket(role.sync_bytes, shape, item), "sync"),
    )
    return EnginePlan(
        items,
        cached_tokens=tokens if tokens >= longest else 0,
        wanted_tokens=wanted,
        needs=weights + adapters + passing + longest * each,
        allotted=allotted,
    )


def sync_bucket(most: int, shape: ModelShape, item: int) -> int:
    """Bytes of one bucket of a weight sync: `most`, but a larger tensor goes whole, and there is no more than the model
    has."""
    return min(max(most, item * max(tensor.size for tensor in shape.tensors())), item * shape.parameters)


def _pass_bytes(role: RolloutRole) -> int:
    """One step of the engine with as many tokens as it may have, and the sampling of as many sequences."""
    shape, engine, workers = role.shape, role.engine, role.placement.tensor_parallel
    item = ITEMSIZE[role.dtype]
    experts = shape.experts
    inner = shape.intermediate if shape.dense_layers else 0
    if experts is not None:
        inner = max(inner, experts.intermediate * experts.per_token + experts.shared_intermediate)
    tokens = max(engine.max_num_batched_tokens, engine.max_model_len)
    states = item * (3 * shape.hidden + 3 * -(-inner // workers)) * tokens
    return states + SORTED_LOGIT * shape.vocab * min(engine.max_num_seqs, tokens)
