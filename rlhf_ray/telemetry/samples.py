"""samples.jsonl: prompts with their responses and scores, for people to read."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray.telemetry.errors import NonFiniteError
from rlhf_ray.telemetry.rows import Row, RowFile, read_rows

# Bytes of JSON up to which the columns of a prompt's row are written with each sample.
COLUMNS_SHOWN = 2000


@dataclass(frozen=True)
class SampleRow:
    """One sample.

    Attributes:
        uid: of the prompt.
        sample_index: which of the prompt's samples this is.
        prompt, response: text.
        score: weighted sum of the parts, before shaping.
        rewards: unweighted score by each part.
        truncated: the response was cut at max_new_tokens.
        kl: from policy to reference, in nats, summed over the response.
        columns: other columns of the prompt's row; None where they are more than `COLUMNS_SHOWN`.
    """

    uid: str
    sample_index: int
    prompt: str
    response: str
    score: float
    rewards: dict[str, float]
    truncated: bool
    kl: float
    columns: dict[str, Any] | None = field(default_factory=dict)


class SamplesLog:
    """Writes samples.jsonl, one sample per line with its step. `resume_step` is as in `MetricsLog`."""

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        self._rows = RowFile(run_dir / "samples.jsonl", resume_step)

    def append(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Write samples of one step; a step may be written in several calls.

        Raises:
            NonFiniteError: a number of a sample is NaN or infinite; nothing was written.
            StepOrderError: samples of a later step were written before.
        """
        bad = {name: value for row in rows for name, value in _numbers(row).items() if not math.isfinite(value)}
        if bad:
            raise NonFiniteError(step, bad)
        self._rows.append(step, [_content(row) for row in rows])

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._rows.close()


def read_samples(run_dir: Path) -> list[tuple[int, SampleRow]]:
    """The samples of samples.jsonl, each with its step.

    Raises:
        FileNotFoundError: the run has not written samples yet.
        DamagedFileError: samples.jsonl was changed by something else.
    """
    return [(row.pop("step"), SampleRow(**row)) for row in read_rows(run_dir / "samples.jsonl")]


def _content(row: SampleRow) -> Row:
    content = asdict(row) | {"rewards": dict(sorted(row.rewards.items()))}
    if row.columns == {}:
        del content["columns"]
    return content


def _numbers(row: SampleRow) -> dict[str, float]:
    numbers = {"score": row.score, "kl": row.kl, **{f"rewards.{name}": value for name, value in row.rewards.items()}}
    return {f"{name} of sample {row.uid}:{row.sample_index}": value for name, value in numbers.items()}
