"""The nearest change to a config with which a job fits: every proposal is planned before it is made."""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice, product

from rlhf_ray.cluster.assignment import PlacementError
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.placement import RolloutPlacement
from rlhf_ray.models.shapes import can_share_heads
from rlhf_ray.planner.calibration import ProcessMemory
from rlhf_ray.planner.hardware import Hardware
from rlhf_ray.planner.memory import MemoryPlan, plan_memory
from rlhf_ray.planner.overrides import JobVariants, arguments
from rlhf_ray.planner.workload import RolloutRole, ScoredRole, TrainedRole

Value = int | float | bool | str

MOST_PLANS = 300
"""Plans that a search makes at most; each takes milliseconds."""
PLANS_FOR_OTHERS = 100
"""Of these, that a search makes for a second proposal once it has one."""
LEAST_GAIN = 0.02
"""Of what is lacking, that a change must bring to be gone on from."""
LACKING = 8.0
"""What lacking as much as at the beginning counts, in the unit of `Move.cost`."""


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
            host = role.placement.colocate or role.placed_as
            yield from _rollout(role, on_gpu=job.placements[host].gpus > 0)
    if len(job.placements) > 1 and not job.placement.leaves_idle:
        yield Move(4, {"placement.offload_idle": True})
    if plan.workload.rollout is not None and plan.store_needed > plan.store:
        batch = plan.workload.rollout.step
        prompts = batch.samples // batch.samples_per_prompt
        if prompts > 1:
            yield Move(4, {"data.prompts_per_step": prompts // 2})


def placement_moves(job: Job) -> Iterator[Move]:
    """For a job that has no place: fewer processes, or fewer CPUs for each."""
    for role, placement in job.placements.items():
        if placement.colocate is not None:
            continue
        size = "engines" if isinstance(placement, RolloutPlacement) else "ranks"
        number = getattr(placement, size) or 1
        if number > 1:
            yield Move(4, {f"placement.{role}.{size}": number // 2})
        if isinstance(placement, RolloutPlacement) and placement.tensor_parallel > 1:
            yield Move(4, {f"placement.{role}.tensor_parallel": placement.tensor_parallel // 2})
        if placement.cpus > 1:
            yield Move(2, {f"placement.{role}.cpus": max(1, int(placement.cpus) // 2)})


def _trained(role: TrainedRole) -> Iterator[Move]:
    engine, key = role.engine, f"{role.section}.engine"
    yield from _smaller_micro_batches(engine.micro_batch_tokens, role.step.longest, key)
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
    sp_size = 2 * engine.sequence_parallel
    if role.ranks % sp_size == 0 and can_share_heads(role.shape, sp_size):
        yield Move(3, {f"{key}.sequence_parallel": sp_size})
    if engine.dtype == "float32":
        yield Move(6, {f"{key}.dtype": "bfloat16"})
    if role.placement.colocate is None:
        yield Move(6, {f"placement.{role.placed_as}.ranks": 2 * role.ranks})


def _scored(role: ScoredRole) -> Iterator[Move]:
    engine, key = role.engine, f"{role.section}.engine"
    yield from _smaller_micro_batches(engine.micro_batch_tokens, role.step.longest, key)
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
    engine, place, key, at = role.engine, role.placement, f"{role.section}.engine", f"placement.{role.placed_as}"
    workers = 2 * place.tensor_parallel
    if can_share_heads(role.shape, workers):
        wider: dict[str, Value] = {f"{at}.tensor_parallel": workers}
        yield Move(6, wider)
        if place.engines > 1:
            yield Move(3, {**wider, f"{at}.engines": place.engines // 2})
    if place.engines > 1:
        yield Move(5, {f"{at}.engines": place.engines // 2})
    if engine.max_num_seqs > 16:
        yield Move(2, {f"{key}.max_num_seqs": engine.max_num_seqs // 2})
    if engine.max_num_batched_tokens > engine.max_model_len:
        tokens = max(engine.max_model_len, engine.max_num_batched_tokens // 2)
        yield Move(1.5, {f"{key}.max_num_batched_tokens": tokens})
    if on_gpu:
        for tenths in range(1, 10):
            if (change := abs(tenths / 10 - engine.gpu_memory_utilization)) > 0.01:
                yield Move(10 * change, {f"{key}.gpu_memory_utilization": tenths / 10})
    elif engine.cpu_kv_cache_gib > 1:
        yield Move(1, {f"{key}.cpu_kv_cache_gib": engine.cpu_kv_cache_gib // 2})


@dataclass(frozen=True)
class Change:
    """Keys of the config, with which the job fits.

    Attributes:
        overrides: to give on the command line.
        cost: how far they are from what was asked for.
        plan: of the job with them.
    """

    overrides: Mapping[str, Value]
    cost: float
    plan: MemoryPlan

    @property
    def arguments(self) -> list[str]:
        """As `key=value`."""
        return arguments(self.overrides)


def nearest_changes(job: Job, hardware: Hardware, processes: ProcessMemory, most: int = 3) -> list[Change]:
    """Changes with which a job fits that does not, nearest first."""
    search = _ChangeSearch(job, hardware, processes)
    start = search.plan({})
    if start is None:
        return search.nearest(None, {}, most)
    # Roles that share nothing that is too small are changed independently of each other.
    found = [search.nearest(roles, {}, most) for roles in _contending(start)]
    combined = sorted(product(*found), key=lambda chosen: sum(change.cost for change in chosen))
    changes: list[Change] = []
    for chosen in islice(combined, 4 * most):
        overrides = {key: value for change in chosen for key, value in change.overrides.items()}
        plan = search.plan(overrides)
        if plan is not None and plan.fits and not _has_same_keys(changes, overrides):
            changes.append(Change(overrides, sum(change.cost for change in chosen), plan))
    if not changes:  # what relieved one group may have filled something that all share
        first = next(iter(combined), ())
        changes = search.nearest(None, {k: v for change in first for k, v in change.overrides.items()}, most)
    return changes[:most]


def _contending(plan: MemoryPlan) -> list[frozenset[str]]:
    """Groups of roles whose memory pools are too small; roles that have a pool in common are in one group."""
    rollout = plan.workload.rollout
    groups = [frozenset({rollout.name})] if rollout and plan.engine and not plan.engine.starts else []
    for pool in plan.pools:
        if not pool.fits:
            joined = frozenset(use.role for use in pool.uses)
            touching = [group for group in groups if group & joined]
            groups = [group for group in groups if not group & joined]
            groups.append(joined.union(*touching))
    return groups


class _ChangeSearch:
    def __init__(self, job: Job, hardware: Hardware, processes: ProcessMemory) -> None:
        self._variants, self._hardware, self._processes = JobVariants(job), hardware, processes

    def plan(self, overrides: Mapping[str, Value]) -> MemoryPlan | None:
        """Of the changed job; None when there is no such job, or no place for it."""
        job = self._variants.job(overrides)
        try:
            return None if job is None else plan_memory(job, self._hardware, self._processes)
        except PlacementError:
            return None

    def nearest(self, roles: frozenset[str] | None, overrides: Mapping[str, Value], most: int) -> list[Change]:
        """Changes after which everything is large enough that any of these roles takes of; None for all roles.

        Of all that was tried, what is nearest is changed further; what is still lacking counts as distance too, or
        every combination of small changes would be tried before a large one.
        """
        order = count()
        plan = self.plan(overrides)
        whole = max(1.0, _excess(plan, roles))
        queue = [(0.0, next(order), 0.0, dict(overrides), plan, whole)]
        seen: set[frozenset[tuple[str, Value]]] = set()
        found: list[Change] = []
        plans, limit = 0, MOST_PLANS
        while queue and len(found) < most and plans < limit:
            _, _, cost, overrides, plan, excess = heapq.heappop(queue)
            if plan is not None and not excess:
                if not _has_same_keys(found, overrides):
                    found.append(Change(overrides, cost, plan))
                    limit = min(limit, plans + PLANS_FOR_OTHERS)
                continue
            for move in self._moves(overrides, plan, roles):
                changed = {**overrides, **move.values}
                following = {path: value for path, value in changed.items() if not self._variants.has(path, value)}
                key = frozenset(following.items())
                if key in seen or any(change.overrides.items() <= following.items() for change in found):
                    continue
                seen.add(key)
                plans += 1
                planned = self.plan(following)
                left = _excess(planned, roles)
                if planned is None or left <= (1 - LEAST_GAIN) * excess:
                    far = cost + move.cost
                    lacking = 1.0 if planned is None else left / whole
                    heapq.heappush(queue, (far + LACKING * lacking, next(order), far, following, planned, left))
        return sorted(found, key=lambda change: change.cost)

    def _moves(
        self, overrides: Mapping[str, Value], plan: MemoryPlan | None, roles: frozenset[str] | None
    ) -> Iterable[Move]:
        if plan is not None:
            return moves_of(plan, roles)
        job = self._variants.job(overrides)
        return () if job is None else placement_moves(job)


def _has_same_keys(changes: Iterable[Change], overrides: Mapping[str, Value]) -> bool:
    """Whether a nearer change sets the same keys, to nearer values."""
    return any(change.overrides.keys() == overrides.keys() for change in changes)


def _excess(plan: MemoryPlan | None, roles: frozenset[str] | None) -> float:
    """Bytes that are lacking where these roles are; no end of them when there is no plan."""
    if plan is None:
        return float("inf")
    lacking = sum(
        -pool.headroom
        for pool in plan.pools
        if not pool.fits and (roles is None or any(use.role in roles for use in pool.uses))
    )
    rollout = plan.workload.rollout
    if rollout and plan.engine and not plan.engine.starts and (roles is None or rollout.name in roles):
        lacking += max(1, plan.engine.needs - (plan.engine.allotted or 0))
    return lacking + (max(0, plan.store_needed - plan.store) if roles is None else 0)
