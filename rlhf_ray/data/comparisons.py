"""Pairs of texts of which a human liked one better, from a JSONL file, as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.data import ComparisonData
from rlhf_ray.data.errors import DataError, DataErrors
from rlhf_ray.data.rows import RowProblem, Uids, parse_rows, text_of
from rlhf_ray.data.tokens import Tokenizer, flat_tokens, rows_within_budget, tokenise
from rlhf_ray.data.trajectory import Offsets, Tokens, offsets_of, take_rows


@dataclass(frozen=True)
class ComparisonSet:
    """Texts in groups, with what people thought of the members of each.

    Row i has the candidates `candidate_offsets[i]` to `candidate_offsets[i + 1]` (without the last), and candidate c is
    `token_ids[token_offsets[c]:token_offsets[c + 1]]`: its prompt and its answer. A pair is a row of two candidates, a
    ranking one of several, a judgement of a single answer one of one.

    Attributes:
        uids: `[rows]`, unique within a file.
        token_ids: int32 `[tokens]`.
        token_offsets: int64 `[candidates + 1]`.
        answer_starts: int64 `[candidates]`, tokens of the prompt that each candidate begins with.
        candidate_offsets: int64 `[rows + 1]`.
        ranks: int64 `[candidates]`, 0 for the best of its row; equal numbers are ties. Of a row with one candidate, 0
            is wanted and 1 unwanted.
        margins: float32 `[rows]`, by how much the best is better than the next; 0 where the file does not say.
        weights: float64 `[rows]`, what each row counts in a mean over rows; 1 where the file does not say.
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


def load_comparisons(config: ComparisonData, path: str | Path, tokenizer: Tokenizer) -> ComparisonSet:
    """Read and tokenise a file of pairs.

    The prompt of a row, where there is one, is prepended to both texts as it is; each text is then tokenised whole,
    with the special tokens that the tokenizer adds by default.

    Args:
        config: the budget, and what happens to pairs over it.
        path: `config.train` or `config.eval`.
        tokenizer: the reward model's.

    Raises:
        DataErrors: rows are not as described; all of them are listed, and nothing is loaded.
        DataError: the file can't be read, or no pair fits the budget.
    """
    file = str(path)
    uids = Uids(file)
    setting = "data.eval" if config.eval is not None and Path(config.eval) == Path(file) else "data.train"
    pairs = parse_rows(file, setting, lambda line, row: _parse(line, row, uids))
    chosen = tokenise(tokenizer, [pair.chosen for pair in pairs])
    rejected = tokenise(tokenizer, [pair.rejected for pair in pairs])

    errors = [
        DataError(file, pair.line, problem)
        for pair, good, bad in zip(pairs, chosen, rejected, strict=True)
        if (problem := _token_problem(good, bad, tokenizer))
    ]
    if errors:
        raise DataErrors(file, errors)
    budget = config.max_tokens
    over = [max(len(good), len(bad)) > budget for good, bad in zip(chosen, rejected, strict=True)]
    # Cut to their ends, two texts can become the same, and then there is nothing left to learn from.
    same = [good[-budget:] == bad[-budget:] for good, bad in zip(chosen, rejected, strict=True)]
    kept, dropped, truncated = rows_within_budget(
        file, "pairs", "end", [pair.uid for pair in pairs], over, same, config
    )
    texts = [text[i][-budget:] for i in kept for text in (chosen, rejected)]
    return ComparisonSet(
        uids=tuple(pairs[i].uid for i in kept),
        token_ids=flat_tokens(texts),
        token_offsets=offsets_of([len(text) for text in texts]),
        answer_starts=np.zeros(len(texts), np.int64),
        candidate_offsets=np.arange(0, len(texts) + 1, 2),
        ranks=np.tile([0, 1], len(kept)),
        margins=np.zeros(len(kept), np.float32),
        weights=np.ones(len(kept)),
        dropped=dropped,
        truncated=truncated,
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    line: int
    uid: str
    chosen: str
    rejected: str


def _parse(line: int, row: dict[str, Any], uids: Uids) -> _Pair:
    uid = uids.of(line, row)
    prompt = text_of(row, "prompt") if "prompt" in row else ""
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    if chosen == rejected:
        raise RowProblem("'chosen' and 'rejected' are the same text, so there is nothing to prefer")
    return _Pair(line, uid, prompt + chosen, prompt + rejected)


def _token_problem(chosen: list[int], rejected: list[int], tokenizer: Tokenizer) -> str | None:
    name = repr(tokenizer.name_or_path)
    if not chosen or not rejected:
        return f"{'rejected' if chosen else 'chosen'!r} gives no tokens with tokenizer {name}"
    if chosen == rejected:
        return f"'chosen' and 'rejected' give the same tokens with tokenizer {name}, so there is nothing to prefer"
    return None
