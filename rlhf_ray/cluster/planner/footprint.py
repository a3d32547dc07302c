"""What one process holds, where, and when."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Place = Literal["device", "host", "disk"]
Phase = Literal["generate", "score", "update", "sync"]
Moment = Literal["generate", "score", "backward", "reduce", "step", "sync"]
"""When memory is held. An update has three: the backward pass begins, gradients are reduced, the optimizer steps."""
Keep = Literal["process", "weights", "states"]
"""What an item is part of, for roles that leave a shared device between their phases: the process, which stays; the
weights, which come back for every phase of the role; and all else, which comes back for its update."""

PHASE_OF: dict[Moment, Phase] = {
    "generate": "generate",
    "score": "score",
    "backward": "update",
    "reduce": "update",
    "step": "update",
    "sync": "sync",
}
PHASES: tuple[Phase, ...] = ("generate", "score", "update", "sync")
UPDATE: frozenset[Moment] = frozenset({"backward", "reduce", "step"})


@dataclass(frozen=True)
class Item:
    """Something in memory.

    Attributes:
        name: what it is.
        size: bytes.
        place: where; the device of a role on the CPU is host memory.
        moments: when; None for all the time.
        keep: what it is part of.
    """

    name: str
    size: int
    place: Place = "device"
    moments: frozenset[Moment] | None = None
    keep: Keep = "states"


def during(name: str, size: float, *moments: Moment, place: Place = "device") -> Item:
    """An item that comes and goes."""
    return Item(name, round(size), place, frozenset(moments))


@dataclass(frozen=True)
class Footprint:
    """All that one process holds."""

    items: tuple[Item, ...]

    @classmethod
    def of(cls, items: Iterable[Item]) -> "Footprint":
        """Items without those of no size."""
        return cls(tuple(item for item in items if item.size))

    def at(self, place: Place, moment: Moment | None) -> int:
        """Bytes at a moment; None for a process that does nothing."""
        return sum(item.size for item in self.items if item.place == place and _held(item, moment))

    def peak(self, place: Place, phase: Phase | None = None) -> int:
        """Most bytes at any moment, or at any of one phase: allocators keep what they once had."""
        return self.at(place, self.peak_moment(place, phase))

    def peak_moment(self, place: Place, phase: Phase | None = None) -> Moment | None:
        """When that is."""
        moments: list[Moment | None] = [None, *(m for m in PHASE_OF if phase in (None, PHASE_OF[m]))]
        return max(moments, key=lambda moment: self.at(place, moment))

    def at_peak(self, place: Place) -> list[Item]:
        """What makes the peak, largest first."""
        moment = self.peak_moment(place)
        held = [item for item in self.items if item.place == place and _held(item, moment)]
        return sorted(held, key=lambda item: -item.size)

    def kept(self, place: Place, *keeps: Keep) -> int:
        """Bytes of the items that are there all the time and part of one of `keeps`."""
        return sum(i.size for i in self.items if i.place == place and i.moments is None and i.keep in keeps)


def _held(item: Item, moment: Moment | None) -> bool:
    return item.moments is None or moment in item.moments
