"""Texts of which people liked some better than others, as tokens."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.data import ComparisonData, ComparisonKind
from rlhf_ray.data.answers import check_special_tokens, load_texts, mark_answers
from rlhf_ray.data.comparison_rows import Comparison, ComparisonParser
from rlhf_ray.data.errors import Findings, RowProblem
from rlhf_ray.data.sources import setting_of
from rlhf_ray.data.tokens import Tokenizer, rows_within_budget
from rlhf_ray.data.trajectory import Offsets, Tokens, flat, offsets_of, take_rows


@dataclass(frozen=True)
class ComparisonSet:
    """Texts in groups, with what people thought of the members of each.

    Row i has the candidates `candidate_offsets[i]` to `candidate_offsets[i + 1]` (without the last), and candidate c is
    `token_ids[token_offsets[c]:token_offsets[c + 1]]`: its prompt and its answer. A pair is a row of two candidates, a
    ranking one of several, a judgement of a single answer one of one.

    Attributes:
        uids: `[rows]`, unique within a source.
        token_ids: int32 `[tokens]`.
        token_offsets: int64 `[candidates + 1]`.
        answer_starts: int64 `[candidates]`, tokens of the prompt that each candidate begins with; 0 where a reward
            model reads the whole.
        candidate_offsets: int64 `[rows + 1]`.
        ranks: int64 `[candidates]`, 0 for the best of its row; equal numbers are ties. Of a row with one candidate, 0
            is wanted and 1 unwanted.
        margins: float32 `[rows]`, by how much the best is better than the next; 0 where the row does not say.
        weights: float64 `[rows]`, what each row counts in a mean over rows; 1 where the row does not say.
        dropped: rows left out because a candidate was over the budget, or because nothing was left to prefer after
            the cut.
        truncated: rows with a candidate that was cut to the budget.
    """

    uids: tuple[str, ...]
    token_ids: Tokens
    token_offsets: Offsets
    answer_starts: NDArray[np.int64]
    candidate_offsets: Offsets
    ranks: NDArray[np.int64]
    margins: NDArray[np.float32]
    weights: NDArray[np.float64]
    dropped: int
    truncated: int

    def __len__(self) -> int:
        return len(self.uids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of all candidates of each row, int64 `[rows]`."""
        return np.diff(self.token_offsets[self.candidate_offsets])

    @property
    def answer_lengths(self) -> NDArray[np.int64]:
        """Tokens of the answer of each candidate, int64 `[candidates]`."""
        return np.diff(self.token_offsets) - self.answer_starts

    def first(self, rows: int | None) -> "ComparisonSet":
        """The first `rows` rows; None takes all."""
        if rows is None or rows >= len(self):
            return self
        candidates = self.candidate_offsets[rows]
        return replace(
            self,
            uids=self.uids[:rows],
            token_ids=self.token_ids[: self.token_offsets[candidates]],
            token_offsets=self.token_offsets[: candidates + 1],
            answer_starts=self.answer_starts[:candidates],
            candidate_offsets=self.candidate_offsets[: rows + 1],
            ranks=self.ranks[:candidates],
            margins=self.margins[:rows],
            weights=self.weights[:rows],
        )

    def candidates(self, rows: Sequence[int]) -> NDArray[np.int64]:
        """Numbers of the candidates of some rows, row by row, int64."""
        return take_rows(self.candidate_offsets, rows)

    def rows_of(self, candidates: Sequence[int]) -> list[int]:
        """The row of each candidate."""
        rows: list[int] = (np.searchsorted(self.candidate_offsets, candidates, side="right") - 1).tolist()
        return rows

    def tokens(self, candidate: int) -> Tokens:
        """Prompt and answer of one candidate."""
        return self.token_ids[self.token_offsets[candidate] : self.token_offsets[candidate + 1]]


def load_comparisons(
    config: ComparisonData,
    path: str | Path,
    tokenizer: Tokenizer,
    kind: ComparisonKind,
    findings: Findings | None = None,
) -> ComparisonSet:
    """Read and tokenise a source of comparisons.

    The texts of a row are all plain or all conversations, which the chat template renders. Optional are `margin` (at
    least 0), by how much the best is better, and `weight` (above 0), what the row counts. A pair for `rewards` or
    `pairs` with `chosen_rating` and `rejected_rating` has their difference as its margin, unless it says another.

    Conversations may begin with the prompt that the row has beside them, as messages or as the text of their first
    message: it is taken once. Plain texts that all begin with their prompt are as `config.repeated_prompt` says.

    - `rewards`: `chosen` and `rejected` (with `tie: true` equally good), or `completions` with `ranks` (0 for the best,
      equal numbers are ties) or with `best` (the place of the one that is better than all others). A `prompt` is put in
      front of each. Only whole texts matter: `answer_starts` are 0. Over the budget they keep their end.
    - `pairs`: `chosen` and `rejected`, each an answer to `prompt`. Without one, conversations must be the same but for
      their last messages, and the prompt of texts is what they have in common up to the last common white space. Plain
      answers end with the tokenizer's end-of-sequence token, which is added. Over the budget they keep their beginning.
    - `labels`: `prompt`, `completion` and `label`, which is whether the completion is wanted; a set row has one
      candidate. A row of `pairs` is two such rows, whose uids end in `/chosen` and `/rejected`.

    Args:
        config: columns, the budget, and what happens to rows over it.
        path: `config.train` or `config.eval`.
        tokenizer: the model's.
        kind: what the rows are for.
        findings: what is found, instead of an error for bad rows.

    Raises:
        DataErrors: rows are not as described, texts of a row are the same, or the tokens before an answer (`pairs`,
            `labels`) are not those of its prompt; all of them are listed, and nothing is loaded.
        DataError: the source can't be read, or no row fits the budget.
    """
    source = str(path)
    parser = ComparisonParser(kind, tokenizer, config.repeated_prompt)
    make = partial(_tokenised, tokenizer=tokenizer, kind=kind)
    rows, found = load_texts(
        source, setting_of(config, source), config.columns, parser.parse, tokenizer, make, findings
    )
    return _within_budget(source, rows, config, kind, found)


@dataclass(frozen=True, slots=True)
class _Row:
    """A row as tokens; fields are those of `ComparisonSet`."""

    uid: str
    texts: list[list[int]]
    answer_starts: list[int]
    ranks: tuple[int, ...]
    margin: float
    weight: float


def _tokenised(
    row: Comparison, tokens: list[list[list[int]]], tokenizer: Tokenizer, kind: ComparisonKind
) -> list[_Row]:
    """The row, or for kind `labels` one for each of its candidates.

    Raises:
        RowProblem: its tokens can't be used.
    """
    texts, starts = [], []
    for key, text, found in zip(row.keys, row.texts, tokens, strict=True):
        if not found[0]:
            raise RowProblem(f"{key!r} gives no tokens with tokenizer {tokenizer.name_or_path!r}")
        try:
            ids, start = found[0], 0
            if kind == "rewards":
                check_special_tokens(ids, tokenizer, is_chat=text.is_chat)
            else:
                ids, answer = mark_answers(text, found, tokenizer)
                start = int(answer.argmax())
        except RowProblem as problem:
            raise RowProblem(f"{key!r}: {problem}") from problem
        texts.append(ids)
        starts.append(start)
    if (same := _first_same(texts)) is not None:
        one, two = (repr(row.keys[place]) for place in same)
        raise RowProblem(
            f"{one} and {two} give the same tokens with tokenizer {tokenizer.name_or_path!r}, so there is nothing to "
            "prefer"
        )
    if kind != "labels":
        return [_Row(row.uid, texts, starts, row.ranks, row.margin, row.weight)]
    uids = [row.uid] if len(texts) == 1 else [f"{row.uid}/{key}" for key in row.keys]
    return [
        _Row(uid, [ids], [start], (rank,), 0.0, row.weight)
        for uid, ids, start, rank in zip(uids, texts, starts, row.ranks, strict=True)
    ]


def _within_budget(
    source: str, rows: Sequence[_Row], config: ComparisonData, kind: ComparisonKind, found: Findings
) -> ComparisonSet:
    budget = config.max_tokens
    part = slice(-budget, None) if kind == "rewards" else slice(budget)
    cut = [[ids[part] for ids in row.texts] for row in rows]
    lengths = [max(map(len, row.texts)) for row in rows]
    # Cut, two texts can become the same, and an answer can be gone: then there is nothing left to learn from.
    useless = [
        _first_same(texts) is not None or any(map(operator.ge, row.answer_starts, map(len, texts)))
        for row, texts in zip(rows, cut, strict=True)
    ]
    end: Literal["beginning", "end"] = "end" if kind == "rewards" else "beginning"
    places, dropped, truncated = rows_within_budget(
        source, end, [row.uid for row in rows], lengths, useless, config, found
    )
    kept = [rows[place] for place in places]
    texts = [ids for place in places for ids in cut[place]]
    return ComparisonSet(
        uids=tuple(row.uid for row in kept),
        token_ids=flat(texts, np.int32),
        token_offsets=offsets_of([len(ids) for ids in texts]),
        answer_starts=np.array([start for row in kept for start in row.answer_starts], np.int64),
        candidate_offsets=offsets_of([len(row.texts) for row in kept]),
        ranks=np.array([rank for row in kept for rank in row.ranks], np.int64),
        margins=np.array([row.margin for row in kept], np.float32),
        weights=np.array([row.weight for row in kept], np.float64),
        dropped=dropped,
        truncated=truncated,
    )


def _first_same(texts: Sequence[list[int]]) -> tuple[int, int] | None:
    """Places of a text and of the first one that is there again."""
    seen: dict[tuple[int, ...], int] = {}
    for place, text in enumerate(texts):
        if (first := seen.setdefault(tuple(text), place)) != place:
            return first, place
    return None
