"""What one process holds, where, and when."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rlhf_ray.config.roles import Level
from rlhf_ray.config.training import Offload

Location = Literal["device", "host", "disk"]
OFFLOAD_LOCATIONS: dict[Offload, Location] = {"none": "device", "cpu": "host", "nvme": "disk"}
StepPhase = Literal["generate", "score", "update", "sync"]
PlannedPhase = Literal["load"] | StepPhase
Moment = Literal["load", "generate", "score", "backward", "reduce", "step", "sync"]
"""When memory is held. An update has three: the backward pass begins, gradients are reduced, the optimizer steps."""

PHASE_OF: dict[Moment, PlannedPhase] = {
    "load": "load",
    "generate": "generate",
    "score": "score",
    "backward": "update",
    "reduce": "update",
    "step": "update",
    "sync": "sync",
}


@dataclass(frozen=True)
class MemoryItem:
    """Something in memory.

    Attributes:
        name: what it is.
        size: bytes.
        location: where; the device of a role on the CPU is host memory.
        moments: when; None for all the time.
        level: of a role that shares its device, from which on it is there. What is there at `OUT` never leaves.
    """

    name: str
    size: int
    location: Location = "device"
    moments: frozenset[Moment] | None = None
    level: Level = Level.FULL


def always(name: str, size: float, level: Level = Level.FULL, location: Location = "device") -> MemoryItem:
    """An item that is there all the time."""
    return MemoryItem(name, round(size), location, None, level)


def during(name: str, size: float, *moments: Moment, location: Location = "device") -> MemoryItem:
    """An item that comes and goes."""
    return MemoryItem(name, round(size), location, frozenset(moments))


@dataclass(frozen=True)
class Footprint:
    """All that one process holds."""

    items: tuple[MemoryItem, ...]

    @classmethod
    def of(cls, items: Iterable[MemoryItem]) -> "Footprint":
        """Items without those of no size."""
        return cls(tuple(item for item in items if item.size))

    def at(self, location: Location, moment: Moment | None) -> list[MemoryItem]:
        """What it holds at a moment, largest first; None for a process that does nothing."""
        held = [i for i in self.items if i.location == location and (i.moments is None or moment in i.moments)]
        return sorted(held, key=lambda item: -item.size)

    def peak(self, location: Location, phase: PlannedPhase | None = None) -> list[MemoryItem]:
        """What it holds when that is most, in one phase or at all, largest first. What is freed after a peak stays with
        the process: allocators keep it."""
        moments: list[Moment | None] = [None, *(m for m in PHASE_OF if phase in (None, PHASE_OF[m]))]
        return max((self.at(location, moment) for moment in moments), key=total)

    def idle(self, location: Location, level: Level) -> list[MemoryItem]:
        """What is left of it on its device when it does nothing and has left as far as `level`."""
        return [item for item in self.at(location, None) if item.level <= level]


def total(items: Iterable[MemoryItem]) -> int:
    """Bytes."""
    return sum(item.size for item in items)
