"""What can be changed in a config so that less memory is needed, and how much one would mind."""

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_ray.config.jobs import JobConfig, PPOJob
from rlhf_ray.config.placement import RolloutPlacement
from rlhf_ray.models.shapes import can_share_heads
from rlhf_ray.planner.memory import MemoryPlan
from rlhf_ray.planner.roles import RolloutRole, ScoredRole, TrainedRole

Value = int | float | bool | str


@dataclass(frozen=True)
class Move:
    """Keys of the config set to other values, together.

    Attributes:
        cost: how far it is from what was asked for: 1 is a little slower, 4 much slower, 6 another plan.
    """

    cost: float
    values: dict[str, Value]


def moves_of(plan: MemoryPlan, roles: frozenset[str] | None) -> Iterator[Move]:
    """What could help these roles; None for all."""
    job = plan.workload.job
    for role in plan.workload.roles:
        if roles is not None and role.name not in roles:
            continue
        if isinstance(role, TrainedRole):
            yield from _trained(role)
        elif isinstance(role, ScoredRole):
            yield from _scored(role)
        else:
            yield from _rollout(role, on_gpu=isinstance(job, PPOJob) and job.placement.gpus_of("rollout") > 0)
    if not getattr(job.placement, "offload_idle", True):
        yield Move(4, {"placement.offload_idle": True})
    if isinstance(job, PPOJob) and job.data.prompts_per_step > 1 and plan.store_needed > plan.store:
        yield Move(4, {"data.prompts_per_step": job.data.prompts_per_step // 2})


def placement_moves(job: JobConfig) -> Iterator[Move]:
    """For a job that has no place: fewer processes, or fewer CPUs for each."""
    for seat, (placement, _) in job.places.items():
        if placement.colocate is not None:
            continue
        size = "engines" if isinstance(placement, RolloutPlacement) else "ranks"
        number = getattr(placement, size) or 1
        if number > 1:
            yield Move(4, {f"placement.{seat}.{size}": number // 2})
        if isinstance(placement, RolloutPlacement) and placement.tensor_parallel > 1:
            yield Move(4, {f"placement.{seat}.tensor_parallel": placement.tensor_parallel // 2})
        if placement.cpus > 1:
            yield Move(2, {f"placement.{seat}.cpus": max(1, int(placement.cpus) // 2)})


def _trained(role: TrainedRole) -> Iterator[Move]:
    engine, key = role.engine, f"{role.key}.engine"
    yield from _smaller_micro_batches(engine.micro_batch_tokens, role.batch.longest, key)
    if not engine.activation_checkpointing:
        yield Move(2, {f"{key}.activation_checkpointing": True})
    if engine.vocab_chunk_tokens > 32:
        yield Move(1.5, {f"{key}.vocab_chunk_tokens": engine.vocab_chunk_tokens // 2})
    if role.ranks > 1:
        for stage in range(engine.zero_stage + 1, 4):
            yield Move(stage / 2, {f"{key}.zero_stage": stage})
    if engine.offload_optimizer == "none":
        yield Move(4, {f"{key}.zero_stage": max(1, engine.zero_stage), f"{key}.offload_optimizer": "cpu"})
    if engine.offload_parameters == "none":
        off = {f"{key}.offload_optimizer": "cpu", f"{key}.offload_parameters": "cpu"}
        yield Move(7, {f"{key}.zero_stage": 3, **off})
    together = 2 * engine.sequence_parallel
    if role.ranks % together == 0 and can_share_heads(role.shape, together):
        yield Move(3, {f"{key}.sequence_parallel": together})
    if engine.dtype == "float32":
        yield Move(6, {f"{key}.dtype": "bfloat16"})
    if role.placement.colocate is None:
        yield Move(6, {f"placement.{role.seat}.ranks": 2 * role.ranks})


def _scored(role: ScoredRole) -> Iterator[Move]:
    engine, key = role.engine, f"{role.key}.engine"
    yield from _smaller_micro_batches(engine.micro_batch_tokens, role.batch.longest, key)
    if role.ranks > 1 and engine.zero_stage == 0:
        yield Move(2, {f"{key}.zero_stage": 3})
    if engine.offload_parameters == "none":
        yield Move(4, {f"{key}.zero_stage": 3, f"{key}.offload_parameters": "cpu"})
    if engine.dtype == "float32":
        yield Move(5, {f"{key}.dtype": "bfloat16"})


def _smaller_micro_batches(budget: int, longest: int, key: str) -> Iterator[Move]:
    halvings, smaller = 0, budget
    while smaller > longest:
        halvings, smaller = halvings + 1, max(longest, smaller // 2)
        yield Move(halvings, {f"{key}.micro_batch_tokens": smaller})


def _rollout(role: RolloutRole, *, on_gpu: bool) -> Iterator[Move]:
    engine, place = role.engine, role.placement
    workers = 2 * place.tensor_parallel
    if can_share_heads(role.shape, workers):
        wider: dict[str, Value] = {"placement.rollout.tensor_parallel": workers}
        yield Move(6, wider)
        if place.engines > 1:
            yield Move(3, {**wider, "placement.rollout.engines": place.engines // 2})
    if place.engines > 1:
        yield Move(5, {"placement.rollout.engines": place.engines // 2})
    if engine.max_num_seqs > 16:
        yield Move(2, {"rollout.engine.max_num_seqs": engine.max_num_seqs // 2})
    if engine.max_num_batched_tokens > engine.max_model_len:
        tokens = max(engine.max_model_len, engine.max_num_batched_tokens // 2)
        yield Move(1.5, {"rollout.engine.max_num_batched_tokens": tokens})
    if on_gpu:
        for tenths in range(1, 10):
            if (change := abs(tenths / 10 - engine.gpu_memory_utilization)) > 0.01:
                yield Move(10 * change, {"rollout.engine.gpu_memory_utilization": tenths / 10})
    elif engine.cpu_kv_cache_gib > 1:
        yield Move(1, {"rollout.engine.cpu_kv_cache_gib": engine.cpu_kv_cache_gib // 2})
