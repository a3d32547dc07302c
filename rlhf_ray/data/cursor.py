"""Which prompts come next. Every prompt comes exactly once in each epoch, and a resumed cursor goes on exactly."""

from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PromptTicket:
    """One visit of one prompt.

    Attributes:
        index: of the prompt in its set.
        epoch: passes over the data before this one.
    """

    index: int
    epoch: int


class CursorState(TypedDict):
    """What a checkpoint holds: the place, and the facts that give it meaning."""

    epoch: int
    position: int
    size: int
    seed: int
    shuffle: bool


class CursorError(Exception):
    """A saved cursor that doesn't belong to this data or this config.

    Attributes:
        field: of the saved state.
        saved, expected: its value in the checkpoint, and the one (or the range) that would fit.
    """

    def __init__(self, field: str, saved: object, expected: object) -> None:
        self.field = field
        self.saved = saved
        self.expected = expected
        super().__init__(
            f"the checkpoint's data cursor has {field} {saved!r}, but here it must be {expected!r}: resume with the "
            "same data file, data.shuffle and seed that the run began with, or start a new run.dir"
        )

    def __reduce__(self) -> tuple[type["CursorError"], tuple[str, object, object]]:
        return type(self), (self.field, self.saved, self.expected)


class PromptCursor:
    """Walks over `size` prompts, epoch after epoch; the order of an epoch is a function of seed and epoch alone."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        if size < 1:
            raise ValueError(f"size is {size}, but a cursor needs at least one prompt")
        self._size = size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._order = self._order_of(0)

    def take(self, n: int) -> list[PromptTicket]:
        """The next `n` visits; they may cross into following epochs."""
        tickets: list[PromptTicket] = []
        while len(tickets) < n:
            rows = self._order[self._position : self._position + n - len(tickets)]
            tickets.extend(PromptTicket(int(row), self._epoch) for row in rows)
            self._position += len(rows)
            if self._position == self._size:
                self._go_to(self._epoch + 1, 0)
        return tickets

    def state_dict(self) -> CursorState:
        """What `load_state_dict` needs to go on exactly here; plain values, fit for JSON."""
        return CursorState(
            epoch=self._epoch, position=self._position, size=self._size, seed=self._seed, shuffle=self._shuffle
        )

    def load_state_dict(self, state: CursorState) -> None:
        """Go on where `state` was taken.

        Raises:
            CursorError: it was taken over other data or with another order, so that prompts would be repeated
                or left out.
        """
        own = self.state_dict()
        for field in ("size", "seed", "shuffle"):
            if state.get(field) != own[field]:
                raise CursorError(field, state.get(field), own[field])
        if not 0 <= state["position"] < self._size:
            raise CursorError("position", state["position"], f"0 to {self._size - 1}")
        if state["epoch"] < 0:
            raise CursorError("epoch", state["epoch"], "0 or more")
        self._go_to(state["epoch"], state["position"])

    def _go_to(self, epoch: int, position: int) -> None:
        if epoch != self._epoch:
            self._order = self._order_of(epoch)
        self._epoch = epoch
        self._position = position

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(self._size, dtype=np.int64)
        return np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(self._size).astype(np.int64)


def visit_uid(uid: str, epoch: int) -> str:
    """The uid of a prompt's visit: a prompt seen again in a later epoch has another one."""
    return f"{uid}@{epoch}"
