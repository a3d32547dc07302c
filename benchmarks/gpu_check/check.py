"""What a check is, and what came of it."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_ray.config.training import Dtype


class CheckFailed(Exception):
    """A result that is not what it has to be; the message has both."""


@dataclass(frozen=True)
class Setting:
    """What checks are given.

    Attributes:
        device: its name, for the table.
        gpus: of this machine; 0 means that checks run on the CPU, on smaller models.
        tiny: folder of a model of a few layers, in float32.
        large: folder of a model whose passes take the device's time, in bfloat16.
        scratch: folder for what checks write.
    """

    device: str
    gpus: int
    tiny: Path
    large: Path
    scratch: Path

    @property
    def on_gpu(self) -> bool:
        """Whether there is one."""
        return self.gpus > 0

    @property
    def gpus_each(self) -> Literal[0, 1]:
        """That a policy reserves, and an engine apart from it."""
        return 1 if self.on_gpu else 0

    @property
    def dtype(self) -> Dtype:
        """Of policy and engine."""
        return "bfloat16" if self.on_gpu else "float32"


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: of the check.
        run: the check.
        needs: modules that have to be installed.
        gpus: that it takes at least; 0 where it runs on a CPU too.
        alone: no process of an earlier check may hold memory of the device beside it.
        limit_s: seconds after which it has failed.
    """

    name: str
    run: Callable[[Setting], str]
    needs: tuple[str, ...] = ()
    gpus: int = 0
    alone: bool = False
    limit_s: float = 120.0


@dataclass(frozen=True)
class Outcome:
    """What came of a check.

    Attributes:
        found: what it measured, why it was skipped, or what was wrong.
        seconds: it took.
    """

    name: str
    state: Literal["pass", "FAIL", "skip"]
    found: str
    seconds: float = 0.0


def why_skipped(check: Check, setting: Setting) -> str:
    """Why a check can't run here; empty where it can."""
    missing = [name for name in check.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if setting.gpus < check.gpus:
        return f"needs {check.gpus} GPU{'s'[: check.gpus > 1]}, here are {setting.gpus}"
    return ""


def table(outcomes: Sequence[Outcome], device: str) -> str:
    """The table, and how many passed."""
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"device: {device}", f"{'check':<{width}}  result  seconds  found"]
    for each in outcomes:
        seconds = "" if each.state == "skip" else f"{each.seconds:.1f}"
        lines.append(f"{each.name:<{width}}  {each.state:<6}  {seconds:>7}  {each.found}")
    counts = {state: sum(outcome.state == state for outcome in outcomes) for state in ("pass", "FAIL", "skip")}
    lines.append(f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skip']} skipped")
    return "\n".join(lines)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """1 where a check has failed. Skipped ones have not."""
    return int(any(outcome.state == "FAIL" for outcome in outcomes))


def at_most(what: str, value: float, limit: float) -> str:
    """`what value`; raises `CheckFailed` for more than the limit, and for NaN."""
    if not value <= limit:
        raise CheckFailed(f"{what} is {value:.3g}, more than {limit:.3g}")
    return f"{what} {value:.2g}"


def equal(what: str, mine: object, wanted: object) -> None:
    """Raise `CheckFailed` where they differ."""
    if mine != wanted:
        raise CheckFailed(f"{what} is {mine!r}, not {wanted!r}"[:400])
