"""The nearest change to a config with which a job fits: every proposal is planned before it is made."""

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count, islice, product
from typing import Any

from rlhf_ray.cluster.assignment import PlacementError
from rlhf_ray.config.jobs import JobConfig
from rlhf_ray.config.loading import ConfigError, apply_override, parse_config
from rlhf_ray.planner.hardware import Hardware
from rlhf_ray.planner.memory import MemoryPlan, plan_memory
from rlhf_ray.planner.moves import Move, Value, moves_of, placement_moves
from rlhf_ray.planner.processes import ProcessMemory

MOST_PLANS = 300
"""Plans that a search makes at most; each takes milliseconds."""
PLANS_FOR_OTHERS = 100
"""Of these, that a search makes for a second proposal once it has one."""
LEAST_GAIN = 0.02
"""Of what is lacking, that a change must bring to be gone on from."""
LACKING = 8.0
"""What lacking as much as at the beginning counts, in the unit of `Move.cost`."""


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
        return [f"{key}={_written(value)}" for key, value in self.overrides.items()]


def nearest_changes(job: JobConfig, hardware: Hardware, processes: ProcessMemory, most: int = 3) -> list[Change]:
    """Changes with which a job fits that does not, nearest first."""
    search = _Search(job, hardware, processes)
    start = search.plan({})
    if start is None:
        return search.nearest(None, {}, most)
    # Roles that share nothing that is too small are changed independently of each other.
    found = [search.nearest(roles, {}, most) for roles in _crowds(start)]
    together = sorted(product(*found), key=lambda parts: sum(part.cost for part in parts))
    changes: list[Change] = []
    for parts in islice(together, 4 * most):
        overrides = {key: value for part in parts for key, value in part.overrides.items()}
        plan = search.plan(overrides)
        if plan is not None and plan.fits and not _has_same_keys(changes, overrides):
            changes.append(Change(overrides, sum(part.cost for part in parts), plan))
    if not changes:  # what relieved one crowd may have filled something that all share
        first = next(iter(together), ())
        changes = search.nearest(None, {k: v for part in first for k, v in part.overrides.items()}, most)
    return changes[:most]


def _crowds(plan: MemoryPlan) -> list[frozenset[str]]:
    """Roles that are too many for something, those that share any of it together."""
    crowds: list[frozenset[str]] = [frozenset({"rollout"})] if plan.engine and not plan.engine.starts else []
    for shelf in plan.shelves:
        if not shelf.fits:
            joined = frozenset(tenant.role for tenant in shelf.tenants)
            touching = [crowd for crowd in crowds if crowd & joined]
            crowds = [crowd for crowd in crowds if not crowd & joined]
            crowds.append(joined.union(*touching))
    return crowds


class _Search:
    def __init__(self, job: JobConfig, hardware: Hardware, processes: ProcessMemory) -> None:
        self._raw: dict[str, Any] = job.model_dump(mode="json", by_alias=True)
        self._hardware, self._processes = hardware, processes

    def job(self, overrides: Mapping[str, Value]) -> JobConfig | None:
        """The changed job; None when the config does not allow it."""
        raw = _copy(self._raw)
        for key, value in overrides.items():
            apply_override(raw, f"{key}={_written(value)}")
        try:
            return parse_config(raw)
        except ConfigError:
            return None

    def plan(self, overrides: Mapping[str, Value]) -> MemoryPlan | None:
        """Of the changed job; None when there is no such job, or no place for it."""
        job = self.job(overrides)
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
                following = self._changed({**overrides, **move.values})
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

    def _changed(self, overrides: Mapping[str, Value]) -> dict[str, Value]:
        """Those that are not so already."""
        return {key: value for key, value in overrides.items() if _at(self._raw, key) != value}

    def _moves(
        self, overrides: Mapping[str, Value], plan: MemoryPlan | None, roles: frozenset[str] | None
    ) -> Iterable[Move]:
        if plan is not None:
            return moves_of(plan, roles)
        job = self.job(overrides)
        return () if job is None else placement_moves(job)


def _has_same_keys(changes: Iterable[Change], overrides: Mapping[str, Value]) -> bool:
    """Whether a nearer change sets the same keys, to nearer values."""
    return any(change.overrides.keys() == overrides.keys() for change in changes)


def _excess(plan: MemoryPlan | None, roles: frozenset[str] | None) -> float:
    """Bytes that are lacking where these roles are; no end of them when there is no plan."""
    if plan is None:
        return float("inf")
    lacking = sum(
        -shelf.headroom
        for shelf in plan.shelves
        if not shelf.fits and (roles is None or any(tenant.role in roles for tenant in shelf.tenants))
    )
    if plan.engine is not None and not plan.engine.starts and (roles is None or "rollout" in roles):
        lacking += max(1, plan.engine.needs - (plan.engine.allotted or 0))
    return lacking + (max(0, plan.store_needed - plan.store) if roles is None else 0)


def _at(raw: Any, path: str) -> Any:
    """The value under a dotted path."""
    for key in path.split("."):
        raw = raw[int(key)] if isinstance(raw, list) else raw[key]
    return raw


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def _written(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
