"""How commands end: exit codes, and errors as messages instead of tracebacks."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from rlhf_ray.telemetry.progress import stderr_console
from rlhf_ray.telemetry.status import without_traceback

logger = logging.getLogger("rlhf_ray")

FAILURE_REPORT = "failure.txt"

MOST_LINES = 20
"""Of one error: who corrects these meets the others."""

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

# By name, since importing the modules that define them would load torch or Ray.
_BAD_INPUT = frozenset(
    {"ConfigError", "ExportError", "PackageTooLarge", "PlanError", "ResumeError", "ShapeError", "UnknownJob"}
)


class Commands(TyperGroup):
    """Runs a command, with errors as messages."""

    def invoke(self, ctx: Any) -> Any:
        with errors_as_messages():
            return super().invoke(ctx)


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """This package's own errors become one message on stderr and an exit code; others, which nobody foresaw, keep their
    traceback."""
    try:
        yield
    except KeyboardInterrupt as stop:
        what, code = how_stopped(stop)
        say(what)
        raise typer.Exit(code) from None
    except Exception as error:
        if not is_own(error):
            raise
        logger.debug("where it came from:", exc_info=error)
        say(message_of(error), error=True)
        raise typer.Exit(exit_code(error)) from None


def how_stopped(stop: KeyboardInterrupt) -> tuple[str, int]:
    """In a word, and the exit code that shells give to the signal."""
    number = getattr(stop, "number", None)  # of `Terminated`, whose module is not imported here
    return ("interrupted", INTERRUPTED) if number is None else ("terminated", 128 + number)


def say(message: str, *, error: bool = False) -> None:
    """Write a message to stderr, unwrapped."""
    prefix = ("error: ", "bold red") if error else ""
    stderr_console().print(Text.assemble(prefix, message), soft_wrap=True)


def is_own(error: BaseException) -> bool:
    """Whether this package raised it, with a message for the user."""
    return type(error).__module__.startswith("rlhf_ray.")


def exit_code(error: BaseException) -> int:
    """2 for what the user gave, 1 for what happened."""
    return BAD_INPUT if any(cls.__name__ in _BAD_INPUT for cls in type(error).__mro__) else FAILED


def message_of(error: BaseException) -> str:
    """The error in words: for a config all problems, a line each; for a failed actor not its traceback."""
    from rlhf_ray.config.loading import ConfigError

    if isinstance(error, ConfigError):
        if len(error.problems) == 1:
            return f"{error.source}: {error.problems[0]}"
        more = len(error.problems) - MOST_LINES
        told = [*error.problems[:MOST_LINES], *([f"and {more:,} more"] if more > 0 else [])]
        return "\n  ".join([f"{error.source} has {len(error.problems):,} problems", *told])
    return "\n".join([without_traceback(str(error)), *getattr(error, "__notes__", [])])


def record_failure(run_dir: Path, error: BaseException) -> None:
    """Write the whole traceback, the actor's included, to `failure.txt` in the run folder, and add that to `error`.

    A run may have taken days until it failed: nobody should have to repeat it with `-v` to see where.
    """
    path = run_dir / FAILURE_REPORT
    with suppress(OSError):  # the disk may be what failed
        if run_dir.is_dir():
            path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            error.add_note(f"The traceback is in {path}.")


def forget_failure(run_dir: Path) -> None:
    """Remove what an earlier try at a run that has now come to its end left."""
    (run_dir / FAILURE_REPORT).unlink(missing_ok=True)
