"""The rows that items are made of, one kind for each job's data, and how they are written."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = 20

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Row:
    uid: str


@dataclass(frozen=True)
class PromptRow(Row):
    prompt: str


@dataclass(frozen=True)
class PairRow(Row):
    """A preference: two texts and the ratings that order them."""

    chosen: str
    rejected: str
    chosen_rating: float
    rejected_rating: float


@dataclass(frozen=True)
class CompletionRow(Row):
    """A text in two parts; the model learns to write the second."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatRow(Row):
    """A conversation."""

    messages: Messages


@dataclass(frozen=True)
class PreferenceRow(Row):
    """Two answers to a conversation; the first is the better one."""

    prompt: Messages
    chosen: Messages
    rejected: Messages


@dataclass(frozen=True)
class LabelRow(Row):
    """An answer to a conversation, and whether it is a good one."""

    prompt: Messages
    completion: Messages
    label: bool


@dataclass(frozen=True)
class RankingRow(Row):
    """Texts and the rank of each, 0 for the best, equal for equally good ones."""

    completions: list[str]
    ranks: list[int]


@dataclass(frozen=True)
class RatedRankingRow(RankingRow):
    """A ranking with the ratings that it is made of."""

    ratings: list[float]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")


def require(count: int, wanted: int, what: str) -> None:
    """Raise `ValueError` when a source gives less than an item needs."""
    if count < wanted:
        raise ValueError(f"the source gives {count} {what} where {wanted} are wanted")
