"""Texts as token ids."""

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np

from rlhf_ray.data.trajectory import Tokens

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


def flat_tokens(rows: Sequence[Sequence[int]]) -> Tokens:
    """All rows one after the other, int32 `[tokens]`."""
    return np.fromiter(chain.from_iterable(rows), np.int32, count=sum(map(len, rows)))


def report_overlong(file: str, what: str, done: str, uids: Sequence[str]) -> None:
    """Log how many rows were over the budget, the first of them, and what was done to them."""
    if uids:
        more = f" and {len(uids) - 5} more" if len(uids) > 5 else ""
        named = ", ".join(uids[:5])
        _LOG.warning("%s: %s over the token budget, %s: %d (%s%s)", file, what, done, len(uids), named, more)
