"""Pairs of texts of which a human liked one better, from a JSONL file, as tokens."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.data import PairData
from rlhf_ray.data.errors import DataError, DataErrors
from rlhf_ray.data.rows import RowProblem, Uids, parse_rows, text_of
from rlhf_ray.data.tokens import Tokenizer, flat_tokens, rows_within_budget, tokenise
from rlhf_ray.data.trajectory import Offsets, Tokens, offsets_of


@dataclass(frozen=True)
class PairSet:
    """All pairs that fit. The chosen text of pair i is `chosen_tokens[chosen_offsets[i]:chosen_offsets[i + 1]]`.

    Attributes:
        uids: `[pairs]`, unique.
        chosen_tokens, chosen_offsets: int32 `[tokens]`, int64 `[pairs + 1]`; prompt and chosen text.
        rejected_tokens, rejected_offsets: the same of the rejected text.
        dropped: pairs left out because a text was over the budget, or because cut to the budget both were the same.
        truncated: pairs with a text of which only the end is here, because it was over the budget.
    """

    uids: tuple[str, ...]
    chosen_tokens: Tokens
    chosen_offsets: Offsets
    rejected_tokens: Tokens
    rejected_offsets: Offsets
    dropped: int
    truncated: int

    def __len__(self) -> int:
        return len(self.uids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of both texts of each pair, int64 `[pairs]`."""
        return np.diff(self.chosen_offsets) + np.diff(self.rejected_offsets)

    @property
    def weights(self) -> NDArray[np.int64]:
        """What each pair counts in a mean over pairs, int64 `[pairs]`."""
        return np.ones(len(self), np.int64)

    def first(self, pairs: int | None) -> "PairSet":
        """The first `pairs` pairs; None takes all."""
        if pairs is None or pairs >= len(self):
            return self
        return replace(
            self,
            uids=self.uids[:pairs],
            chosen_tokens=self.chosen_tokens[: self.chosen_offsets[pairs]],
            chosen_offsets=self.chosen_offsets[: pairs + 1],
            rejected_tokens=self.rejected_tokens[: self.rejected_offsets[pairs]],
            rejected_offsets=self.rejected_offsets[: pairs + 1],
        )

    def chosen(self, index: int) -> Tokens:
        """Tokens of one pair's prompt and chosen text."""
        return self.chosen_tokens[self.chosen_offsets[index] : self.chosen_offsets[index + 1]]

    def rejected(self, index: int) -> Tokens:
        """Tokens of one pair's prompt and rejected text."""
        return self.rejected_tokens[self.rejected_offsets[index] : self.rejected_offsets[index + 1]]


def load_pairs(config: PairData, path: str | Path, tokenizer: Tokenizer) -> PairSet:
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
    chosen_rows = [chosen[i][-budget:] for i in kept]
    rejected_rows = [rejected[i][-budget:] for i in kept]
    return PairSet(
        uids=tuple(pairs[i].uid for i in kept),
        chosen_tokens=flat_tokens(chosen_rows),
        chosen_offsets=offsets_of([len(row) for row in chosen_rows]),
        rejected_tokens=flat_tokens(rejected_rows),
        rejected_offsets=offsets_of([len(row) for row in rejected_rows]),
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
