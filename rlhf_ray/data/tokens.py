"""Texts as token ids."""

import logging
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any, Literal, Protocol

from rlhf_ray.config.data import ComparisonData, ConversationData
from rlhf_ray.data.errors import DataError, Findings

_LOG = logging.getLogger(__name__)

# Enough texts to keep a fast tokenizer's threads busy, few enough that its encodings are not held all at once.
_TEXTS_PER_CALL = 1024


class Tokenizer(Protocol):
    """What loading data needs of a Hugging Face tokenizer."""

    name_or_path: str
    chat_template: Any
    bos_token: Any
    bos_token_id: Any
    eos_token: Any
    eos_token_id: Any

    @property
    def special_tokens_map(self) -> Mapping[str, Any]: ...

    def get_chat_template(self) -> str: ...

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...


def tokenise(tokenizer: Tokenizer, texts: Sequence[str], **options: bool) -> list[list[int]]:
    """Token ids of each text. `options` go to the tokenizer; without any it adds the special tokens it is made to."""
    rows: list[list[int]] = []
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        chunk = list(texts[start : start + _TEXTS_PER_CALL])
        # verbose=False: overlong texts are reported by the loaders, in our terms.
        rows.extend(tokenizer(chunk, return_attention_mask=False, verbose=False, **options)["input_ids"])
    return rows


def rows_within_budget(
    source: str,
    end: Literal["beginning", "end"],
    uids: Sequence[str],
    lengths: Sequence[int],
    useless: Sequence[bool],
    config: ComparisonData | ConversationData,
    found: Findings,
) -> tuple[list[int], int, int]:
    """Drop rows that are over `config.max_tokens`, or let them be cut, and report both.

    Args:
        end: the end of a row that stays when it is cut.
        lengths: tokens that count for each row.
        useless: which rows over the budget would have nothing to learn from when cut.

    Returns:
        Numbers of the rows to keep, and how many are dropped and cut.

    Raises:
        DataError: none is kept.
    """
    found.lengths = list(lengths)
    over = [length > config.max_tokens for length in lengths]
    drop = [is_over and (config.overlong == "drop" or cut) for is_over, cut in zip(over, useless, strict=True)]
    cut = [is_over and not is_dropped for is_over, is_dropped in zip(over, drop, strict=True)]
    report_overlong(source, "rows", "dropped", list(compress(uids, drop)))
    report_overlong(source, "rows", f"truncated to their {end}", list(compress(uids, cut)))
    kept = [row for row, is_dropped in enumerate(drop) if not is_dropped]
    if not kept:
        cure = (
            ", or set data.overlong to truncate"
            if config.overlong == "drop"
            else ": a row cut to that has nothing to learn from"
        )
        reason = f"none of {len(uids)} rows fits data.max_tokens ({config.max_tokens}): raise it{cure}"
        raise DataError(source, None, reason)
    return kept, sum(drop), sum(cut)


def report_overlong(source: str, what: str, done: str, uids: Sequence[str]) -> None:
    """Log how many rows were over the budget, the first of them, and what was done to them."""
    if uids:
        more = f" and {len(uids) - 5} more" if len(uids) > 5 else ""
        named = ", ".join(uids[:5])
        _LOG.warning("%s: %s over the token budget, %s: %d (%s%s)", source, what, done, len(uids), named, more)
