"""What commands print when all went well."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.text import Text

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.number_formats import NumberFormats
from rlhf_ray.controllers.descriptions import Line
from rlhf_ray.controllers.job import definition_of
from rlhf_ray.recovery.checkpoints import CheckpointStore
from rlhf_ray.telemetry.metrics import read_metrics
from rlhf_ray.telemetry.progress import QuietConsole


def show(rows: Iterable[tuple[str, ...]]) -> None:
    """Columns on stdout, the first in bold. A row is never broken, so that paths can be copied."""
    table = list(rows)
    if not table:
        return
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    console = QuietConsole()
    for row in table:
        first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        text = Text.assemble((first, "bold"), *(f"  {cell}" for cell in others))
        text.rstrip()
        console.print(text, soft_wrap=True)


def note(line: str) -> None:
    """A line on stdout."""
    QuietConsole().print(Text(line), soft_wrap=True)


def config_lines(config: Job, inputs: Any | None) -> Iterator[Line]:
    """A config in short.

    Args:
        inputs: what the check of models and data found; None when it was not asked for.
    """
    yield "job", f"{config.job} {config.name!r}, seed {config.seed}"
    yield from definition_of(config).describe(config, inputs)
    yield "run", f"{config.run.dir}{_standing(config)}"


def number_format_lines(formats: NumberFormats) -> Iterator[Line]:
    """What `dtype: auto` became and why, and what was written out and is slow."""
    yield from (("dtype auto", line) for line in formats.lines)
    if formats.open:
        yield "dtype auto", f"for {', '.join(formats.open)}: chosen at the start, by the CPUs that they come to"
    yield from (("warning", warning) for warning in formats.warnings)


def _standing(config: Job) -> str:
    steps = checkpointed_steps(config)
    if not steps:
        return ""
    then = "train refuses it, since run.resume is 'never'" if config.run.resume == "never" else "train goes on from it"
    return f", which has a checkpoint of step {steps[-1]}: {then}"


def checkpointed_steps(config: Job) -> list[int]:
    """Steps that the run folder has complete checkpoints of, ascending."""
    return CheckpointStore(Path(config.run.dir), config.run.keep_last, config.run.keep_best).steps()


def run_lines(config: Job, folder: Path) -> Iterator[Line]:
    """How a finished run went, and where its results are."""
    rows = read_metrics(folder)
    yield from definition_of(config).results(config, rows)
    files = {
        "metrics": "metrics.jsonl",
        "curves": "curves.png",
        "report": "reward_report.md",
        "reliability": "reliability.png",
        "samples": "samples.jsonl",
        "before and after": "before_after.md",
        "trace": "timeline.json",
        "TensorBoard": "tensorboard",
        "model": "export",
        "adapter": "export/adapter",
    }
    yield from ((what, str(folder / file)) for what, file in files.items() if _has_content(folder / file))
    if steps := checkpointed_steps(config):
        named = ", ".join(map(str, steps))
        yield "checkpoints", f"{folder / 'checkpoints'} ({'step' if len(steps) == 1 else 'steps'} {named})"


def _has_content(path: Path) -> bool:
    return path.is_dir() or (path.is_file() and path.stat().st_size > 0)
