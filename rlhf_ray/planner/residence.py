"""Which roles work in which stage of a step, and which have left their devices to others then."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rlhf_ray.cluster.sharing import NEEDS, DeviceSharing
from rlhf_ray.config.jobs import JobConfig, PPOJob, PreferenceJob
from rlhf_ray.config.roles import Level
from rlhf_ray.config.sharing import shared_places
from rlhf_ray.planner.footprint import Phase

_OfStep = Literal["generate", "score", "update", "sync"]


@dataclass(frozen=True)
class Stage:
    """A part of a step.

    Attributes:
        name: for people.
        phase: of the step.
        working: seats of the roles that work in it.
        levels: of the roles that leave their devices to others; others are always there.
    """

    name: str
    phase: Phase
    working: frozenset[str]
    levels: Mapping[str, Level]


def stages(job: JobConfig) -> list[Stage]:
    """The stages of a step, after the loading of all models, in a run that has settled."""
    places = job.places
    leaves = getattr(job.placement, "offload_idle", False)
    sharing = DeviceSharing(shared_places(places) if leaves else [])
    parts = _parts(job, sharing)
    for _, phase, roles in parts:  # one step before the one that is told of
        sharing.enter(phase, roles)
    # Roles that leave load one after the other, and go before the next comes; a device must hold any of them whole.
    found = [Stage("load", "load", frozenset(places), {})]
    for name, phase, roles in parts:
        sharing.enter(phase, roles)
        found.append(Stage(name, phase, roles, dict(sharing.levels)))
    return found


def _parts(job: JobConfig, sharing: DeviceSharing) -> list[tuple[str, _OfStep, frozenset[str]]]:
    there = frozenset(job.places)
    if isinstance(job, PPOJob):
        phases: tuple[_OfStep, ...] = ("generate", "score", "update", "sync")
        trained = ["critic", "policy"]
    else:
        phases = ("score", "update") if isinstance(job, PreferenceJob) and "reference" in there else ("update",)
        trained = [job.trained.name]
    parts: list[tuple[str, _OfStep, frozenset[str]]] = []
    for phase in phases:
        if phase == "update":
            turns = sharing.turns(trained)
            parts += [(_name(turn, turns), phase, frozenset(turn)) for turn in turns]
        else:
            parts.append((phase, phase, there & NEEDS[phase].keys()))
    return parts


def _name(turn: list[str], turns: list[list[str]]) -> str:
    return "update" if len(turns) == 1 else f"update {' and '.join(turn)}"
