"""The other columns of a prompt's row, on their way to what scores the responses.

A row travels as JSON in UTF-8: in a request, in a trajectory, and in a batch, where it is bytes of an array that passes
through Ray's object store without copies. Only who reads columns decodes them.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.errors import RowProblem
from rlhf_ray.data.rows import kind_of, nested

# Bytes of the columns of one row. They go with each sample to every role, and to services in each request.
ROW_LIMIT = 64 * 2**10
NO_COLUMNS = b"{}"


@dataclass(frozen=True, slots=True)
class RowColumn:
    """A column that rows of prompts have.

    Attributes:
        name: in the source.
        rows: how many have it.
        first_without: uid of the first row that has it not; None where all have it.
    """

    name: str
    rows: int
    first_without: str | None


def encoded_columns(columns: Mapping[str, Any]) -> bytes:
    """The columns of a row as JSON.

    Raises:
        RowProblem: a value is of no kind that JSON has, or they take more than `ROW_LIMIT`.
    """
    if not columns:
        return NO_COLUMNS
    for name, value in columns.items():
        if told := _not_json(value):
            raise RowProblem(f"column {name!r} {told}, which JSON does not have: {_CURE}")
    try:
        text = json.dumps(columns, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise RowProblem(f"has half of a surrogate pair in one of its columns {', '.join(columns)!r}") from error
    except (ValueError, RecursionError) as error:
        raise RowProblem(f"has columns that can't be written as JSON: {error}") from error
    if len(text) > ROW_LIMIT:
        raise RowProblem(
            f"has other columns of {len(text):,} bytes as JSON, more than the {ROW_LIMIT:,} that can travel with a "
            f"sample: {_CURE}"
        )
    return text


_CURE = "name in data.keep_columns those that rewards read"


def _not_json(value: Any) -> str | None:
    """What of a value is no JSON, None where it is."""
    for inner, _ in nested(value):
        if isinstance(inner, float) and not math.isfinite(inner):
            return f"has the number {inner}"
        if isinstance(inner, dict) and any(not isinstance(key, str) for key in inner):
            return "has an object with keys that are no text"
        if not isinstance(inner, dict | list | tuple | str | int | float | None):
            return f"has a value {kind_of(inner)}"
    return None


def columns_of(uids: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[RowColumn, ...]:
    """What columns there are, in the order in which they are met.

    Args:
        rows: the names of each row's columns.
    """
    counts = Counter(name for names in rows for name in names)

    def first_without(name: str) -> str | None:
        if counts[name] == len(rows):
            return None
        return next(uid for uid, names in zip(uids, rows, strict=True) if name not in names)

    return tuple(RowColumn(name, count, first_without(name)) for name, count in counts.items())


@dataclass(frozen=True)
class PromptRows:
    """Columns of the rows that samples are from. Each row is there once, however many of its samples there are.

    Sample i has the row `text[offsets[n]:offsets[n + 1]]`, where n is `numbers[i]`.

    Attributes:
        text: JSON, uint8 `[bytes]`.
        offsets: int64 `[rows + 1]`.
        numbers: int64 `[samples]`.
    """

    text: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    numbers: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[bytes]) -> Self:
        """Of the row of each sample."""
        number: dict[bytes, int] = {}
        numbers = [number.setdefault(row, len(number)) for row in rows]
        return cls(
            text=np.frombuffer(b"".join(number), np.uint8),
            offsets=np.cumsum([0, *map(len, number)], dtype=np.int64),
            numbers=np.array(numbers, np.int64),
        )

    @classmethod
    def concat(cls, batches: Sequence[Self]) -> Self:
        """Of the samples of several batches, in order."""
        texts = np.cumsum([0, *(len(rows.text) for rows in batches)])
        firsts = np.cumsum([0, *(len(rows.offsets) - 1 for rows in batches)])
        ends = [rows.offsets[1:] + start for rows, start in zip(batches, texts, strict=False)]
        return cls(
            text=np.concatenate([rows.text for rows in batches]),
            offsets=np.concatenate([np.zeros(1, np.int64), *ends]),
            numbers=np.concatenate([rows.numbers + first for rows, first in zip(batches, firsts, strict=False)]),
        )

    def select(self, samples: NDArray[np.int64]) -> Self:
        """Of some of the samples. The rows of the others stay, so that nothing is copied."""
        return type(self)(self.text, self.offsets, self.numbers[samples])

    def __len__(self) -> int:
        return len(self.numbers)

    def json(self, sample: int) -> bytes:
        """The columns of one sample."""
        row = self.numbers[sample]
        return self.text[self.offsets[row] : self.offsets[row + 1]].tobytes()

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Values of each column, `[samples]`; None where a row has it not. Each sample has values of its own."""
        if not names:
            return {}
        rows: list[dict[str, Any]] = [json.loads(self.json(sample)) for sample in range(len(self))]
        return {name: [row.get(name) for row in rows] for name in names}

    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.text.nbytes + self.offsets.nbytes + self.numbers.nbytes
