"""Append-only JSON lines, ordered by step, that survive a kill at any moment and can be taken back to a step."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from rlhf_ray.recovery.files import replace_file
from rlhf_ray.telemetry.errors import DamagedFileError, StepOrderError

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class RowFile:
    """One object per line, `step` first. Every append is on disk when the call returns.

    Opening it removes, atomically, the rows beyond `resume_step`: a killed run may have written more than its
    last checkpoint knows. With None, a run that starts at its beginning, all rows are removed.

    Raises:
        DamagedFileError: a row other than a torn last one cannot be read.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.path = path
        self.last_step: int | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._take_back(resume_step)
        self._file = path.open("ab")

    def append(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of one step.

        Raises:
            StepOrderError: a later step was written before.
            ValueError: a row holds NaN or infinity.
        """
        if self.last_step is not None and step < self.last_step:
            raise StepOrderError(self.path, step, self.last_step)
        # Numpy's numbers, which samples come with, are none to JSON.
        encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=np.generic.item).encode
        lines = [encode({"step": step, **row}) for row in rows]
        # A lone surrogate in sampled text has no UTF-8; its backslash form is the JSON escape of it.
        self._file.write("".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.last_step = step

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_back(self, resume_step: int | None) -> None:
        kept, removed = [], 0
        for line, row in _parsed_lines(self.path):
            if row is not None and resume_step is not None and row["step"] <= resume_step:
                kept.append(line)
                self.last_step = row["step"]
            else:
                removed += 1
        if removed:
            replace_file(self.path, b"".join(kept))
            start = "the start" if resume_step is None else f"step {resume_step}"
            logger.warning("%s: removed %d rows of an earlier run; this one goes on from %s", self.path, removed, start)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, also of one that a run still writes: a torn last line is left out.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: another line cannot be read.
    """
    return [row for _, row in _parsed_lines(path) if row is not None]


def _parsed_lines(path: Path) -> Iterator[tuple[bytes, Row | None]]:
    """Each line with its row; None for a line without its end, which a killed writer left."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                yield line, None
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DamagedFileError(path, f"line {number} is not JSON: {error}") from None
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise DamagedFileError(path, f"line {number} is not an object with an integer step")
            yield line, row
