"""What is wrong with a data file: always the file, the row where there is one, the reason and the cure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Characters of a reason.
_LONGEST = 1000


class RowProblem(Exception):
    """What is wrong with one row; who knows its file and number makes a `DataError` of it. What is quoted of a row
    can be megabytes: a long reason is cut."""

    def __str__(self) -> str:
        reason = super().__str__()
        return reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}… ({len(reason):,} characters)"


class KnownProblem(RowProblem):
    """The same problem was told of an earlier row: this one can't be used either, but need not be listed."""


class DataError(Exception):
    """A data file that can't be used.

    Attributes:
        file: path of the file, or the name of the source.
        row: its line, or where a source has no lines its entry, counted from 1; None when the whole is meant.
        reason: what is wrong and how to cure it.
    """

    def __init__(self, file: str, row: int | None, reason: str) -> None:
        self.file = file
        self.row = row
        self.reason = reason
        super().__init__(f"{file}: {reason}" if row is None else f"{file}:{row}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions cross process borders pickled; the default would call __init__ with the message alone.
        return type(self), (self.file, self.row, self.reason)


MOST_LISTED = 20
"""Of the problems of one file: who corrects these meets the others."""
_LONGEST_LINE = 500
# What differs between two rows with the same problem: what is quoted, and numbers.
_OWN_OF_A_ROW = re.compile(r"'[^']*'|\"[^\"]*\"|[0-9]+")


def by_kind(errors: Sequence[DataError]) -> list[str]:
    """At most `MOST_LISTED` problems as lines, in the order of the file and some of each kind, with how many more there
    are of it."""
    kinds: dict[str, list[int]] = {}
    for number, error in enumerate(errors):
        kinds.setdefault(_OWN_OF_A_ROW.sub("…", error.reason[:_LONGEST_LINE]), []).append(number)
    # One of each kind, then a second of each, until there are enough.
    turns = sorted((turn, number) for numbers in kinds.values() for turn, number in enumerate(numbers[:MOST_LISTED]))
    listed = {number for _, number in turns[:MOST_LISTED]}
    lines = [_line(errors[number]) for number in sorted(listed)]
    told = 0
    for numbers in sorted(kinds.values(), key=len, reverse=True):
        more = sum(number not in listed for number in numbers)
        example = next((errors[number].row for number in numbers if number in listed), None)
        if more and example is not None:
            lines.append(f"… and {more:,} more like that of row {example}")
            told += more
    if rest := len(errors) - len(listed) - told:
        lines.append(f"… and {rest:,} more of other kinds")
    return lines


def _line(error: DataError) -> str:
    text = str(error)
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}…"


class DataErrors(DataError):
    """All bad rows of one file. Nothing of a file is used when one of its rows is bad.

    Attributes:
        errors: one for each bad row, in the order of the file.
    """

    def __init__(self, file: str, errors: Sequence[DataError]) -> None:
        self.errors = tuple(errors)
        rows = "1 row" if len(errors) == 1 else f"{len(errors):,} rows"
        listing = "".join(f"\n  {line}" for line in by_kind(errors))
        super().__init__(file, None, f"{rows} can't be used; correct or remove them:{listing}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.file, self.errors)


@dataclass
class Findings:
    """What loading a source shows beside its rows. A loader that is given one leaves bad rows out instead of refusing
    the source, unless all are bad.

    Attributes:
        read: rows of the source, good and bad.
        lengths: tokens of each good row before any was cut or dropped; of a comparison those of its longest candidate.
        problems: what is wrong with rows, and with the source as a whole.
    """

    read: int = 0
    lengths: list[int] = field(default_factory=list)
    problems: list[DataError] = field(default_factory=list)


def raise_all(source: str, problems: Sequence[DataError]) -> None:
    """Raise `DataErrors` of the problems of a source, where there are any.

    Args:
        problems: with rows, in any order.
    """
    if problems:
        raise DataErrors(source, sorted(problems, key=lambda problem: problem.row or 0))
