"""What the checks found."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Check:
    """One check of all nodes.

    Attributes:
        name: of the check.
        detail: what was seen, or why nothing was.
        problems: a line each: the node or setting, what is wrong, and the cure.
        skipped: it was not made.
    """

    name: str
    detail: str
    problems: tuple[str, ...] = ()
    skipped: bool = False

    @property
    def status(self) -> Literal["ok", "failed", "skipped"]:
        """In a word."""
        return "failed" if self.problems else "skipped" if self.skipped else "ok"


@dataclass(frozen=True)
class Broadcast:
    """A broadcast that was timed.

    Attributes:
        backend: of torch.distributed.
        source: node that sent.
        size: bytes.
        seconds: until they were there, by node.
    """

    backend: str
    source: str
    size: int
    seconds: Mapping[str, float]

    @property
    def speeds(self) -> dict[str, float]:
        """Bytes per second, by node."""
        return {node: self.size / seconds for node, seconds in self.seconds.items()}


@dataclass(frozen=True)
class Report:
    """All checks.

    Attributes:
        checks: in order.
        node_ids: Ray's id of every node that was there, by its name.
        broadcasts: what was measured.
        seconds: that it took.
    """

    checks: tuple[Check, ...]
    node_ids: Mapping[str, str]
    broadcasts: tuple[Broadcast, ...]
    seconds: float

    def __str__(self) -> str:
        nodes = "1 node" if len(self.node_ids) == 1 else f"{len(self.node_ids)} nodes"
        speed = "".join(f", {min(each.speeds.values()) / 1e9:.2f} GB/s over {each.backend}" for each in self.broadcasts)
        return f"{nodes} looked at in {self.seconds:.1f} s{speed}"

    @property
    def problems(self) -> list[str]:
        """Of all checks."""
        return [problem for check in self.checks for problem in check.problems]

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "seconds": round(self.seconds, 2),
            "nodes": list(self.node_ids),
            "checks": [{"status": check.status, **asdict(check)} for check in self.checks],
            "broadcasts": [asdict(broadcast) for broadcast in self.broadcasts],
        }


class PreflightError(Exception):
    """The cluster can't run the job.

    Attributes:
        problems: of all checks, a line each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        found = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n  ".join([f"preflight: {found}", *self.problems]))

    def __reduce__(self) -> tuple[type["PreflightError"], tuple[list[str]]]:
        return type(self), (self.problems,)
