"""What an item of `prepare` is, and the error of one that can't be built."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class PrepareError(Exception):
    """An item that could not be built. Attributes: `item`, `problem`, `cure`."""

    def __init__(self, item: str, problem: str, cure: str) -> None:
        super().__init__(f"prepare {item}: {problem}. {cure}")
        self.item = item
        self.problem = problem
        self.cure = cure


@dataclass(frozen=True)
class Item:
    """Something `prepare` builds: its outputs below the target, and the items it reads from the target.

    `build(stage, target)` writes the outputs below `stage`; it may use `stage / "work"` for anything else.
    """

    name: str
    outputs: tuple[str, ...]
    build: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreparedItem:
    """One item after `prepare`: where it lies, whether this call built it, and how long that took."""

    name: str
    paths: tuple[Path, ...]
    built: bool
    seconds: float
