"""Memory of one rank of a model that only computes forward passes: reference and reward models."""

from rlhf_ray.config.roles import Level
from rlhf_ray.planner.activations import ITEMSIZE, PassShape
from rlhf_ray.planner.footprint import PLACES, Item, always, during
from rlhf_ray.planner.roles import ScoredRole
from rlhf_ray.planner.trained_memory import PERSISTENT, gathered_elements, swapped_weights


def scored_items(role: ScoredRole, *, cpu: bool) -> list[Item]:
    """What one rank holds, without the process itself."""
    engine, shape = role.engine, role.shape
    item = ITEMSIZE[engine.dtype]
    weights = item * shape.parameters
    how = PassShape(
        shape,
        engine.dtype,
        cpu,
        vocab_chunk_tokens=engine.vocab_chunk_tokens,
        sequence_parallel=engine.sequence_parallel,
    )
    pack = role.batch.score_pack(engine, role.ranks)
    passing = how.forward_bytes(pack.tokens) + how.head_bytes(pack, backward=False)
    items = [during("logits and states", passing, "score")]
    if engine.zero_stage == 0:
        return [always("weights", weights, Level.WEIGHTS), *items]
    place = PLACES[engine.offload_parameters]
    largest = max(tensor.size for tensor in shape.tensors())
    gathered = gathered_elements(shape.parameters, largest, role.ranks, place, cpu=cpu) * item
    whole = sum(tensor.size * tensor.count for tensor in shape.tensors() if tensor.size <= PERSISTENT) * item
    return [
        always("weights", weights / role.ranks, Level.WEIGHTS, place),
        always("weights kept whole", whole if role.ranks > 1 or place != "device" else 0, Level.WEIGHTS),
        *swapped_weights(item * largest, role.ranks, place),
        during("gathered weights", gathered, "score"),
        *items,
    ]
