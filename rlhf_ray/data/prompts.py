"""Prompts, as tokens."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf_ray.config.data import PromptData
from rlhf_ray.data.answers import AnsweredText, ParsedRow, load_texts
from rlhf_ray.data.chat import ChatRenderer, check_prompt_chat
from rlhf_ray.data.errors import DataError, Findings, RowProblem
from rlhf_ray.data.prompt_rows import NO_COLUMNS, RowColumn, columns_of, encoded_columns
from rlhf_ray.data.rows import kind_of, text_of, value_of
from rlhf_ray.data.tokens import Tokenizer, report_overlong
from rlhf_ray.data.trajectory import Offsets, Tokens, flat, offsets_of

# Each is a list for every batch of samples that is scored.
_MOST_COLUMNS = 1000


@dataclass(frozen=True)
class PromptSet:
    """All prompts that fit. Prompt i is `token_ids[offsets[i]:offsets[i + 1]]`.

    Attributes:
        uids: `[prompts]`, unique.
        token_ids: int32 `[tokens]`.
        offsets: int64 `[prompts + 1]`.
        dropped: prompts left out because they were over the budget.
        truncated: prompts of which only the end is here, because they were over the budget.
        rows: the other columns of each prompt's row, as JSON, `[prompts]`; empty where no row has any.
        columns: which columns these are.
    """

    uids: tuple[str, ...]
    token_ids: Tokens
    offsets: Offsets
    dropped: int
    truncated: int
    rows: tuple[bytes, ...] = ()
    columns: tuple[RowColumn, ...] = ()

    def __len__(self) -> int:
        return len(self.uids)

    def tokens(self, index: int) -> Tokens:
        """Tokens of one prompt."""
        return self.token_ids[self.offsets[index] : self.offsets[index + 1]]

    def row(self, index: int) -> bytes:
        """The other columns of one prompt's row, as JSON."""
        return self.rows[index] if self.rows else NO_COLUMNS


def load_prompts(
    config: PromptData, tokenizer: Tokenizer, max_prompt_tokens: int, findings: Findings | None = None
) -> PromptSet:
    """Read and tokenise `config.prompts`.

    A row's prompt is text, tokenised as it is, or a list of chat messages, rendered with the tokenizer's chat
    template up to where the assistant's turn begins. A row without a uid is named after its source and number. Its
    other columns, or those of them that `config.keep_columns` names, travel with the samples.

    Args:
        config: the source, its columns, and what happens to prompts over the budget.
        tokenizer: the policy's.
        max_prompt_tokens: the budget of one prompt.
        findings: what is found, instead of an error for bad rows or too few.

    Raises:
        DataErrors: rows are not as described; all of them are listed, and nothing is loaded.
        DataError: the source can't be read or has fewer usable prompts than `config.prompts_per_step`.
    """
    parser = _PromptParser(tokenizer, config.keep_columns)

    def tokenised(prompt: _Prompt, tokens: list[list[list[int]]]) -> list[tuple[_Prompt, list[int]]]:
        [[ids]] = tokens
        if not ids:
            raise RowProblem(f"'prompt' gives no tokens with tokenizer {tokenizer.name_or_path!r}")
        return [(prompt, ids)]

    prompts, found = load_texts(
        config.prompts, "data.prompts", config.columns, parser.parse, tokenizer, tokenised, findings
    )
    found.lengths = [len(ids) for _, ids in prompts]
    over = [prompt.uid for prompt, ids in prompts if len(ids) > max_prompt_tokens]
    drop = config.overlong == "drop"
    kept = [(prompt, ids[-max_prompt_tokens:]) for prompt, ids in prompts if not drop or len(ids) <= max_prompt_tokens]
    report_overlong(config.prompts, "prompts", "dropped" if drop else "truncated to their end", over)
    if len(kept) < config.prompts_per_step:
        too_few = DataError(
            config.prompts,
            None,
            f"{len(kept)} of {len(prompts)} prompts fit the budget of {max_prompt_tokens} tokens, but "
            f"data.prompts_per_step is {config.prompts_per_step}: give more prompts, lower data.prompts_per_step, "
            "raise data.max_prompt_tokens, or set data.overlong to truncate",
        )
        if findings is None or not kept:
            raise too_few
        findings.problems.append(too_few)
    uids = tuple(prompt.uid for prompt, _ in kept)
    columns = columns_of(uids, [prompt.columns for prompt, _ in kept])
    there = {column.name for column in columns}
    if len(columns) > _MOST_COLUMNS:
        raise DataError(
            config.prompts,
            None,
            f"its rows have {len(columns):,} different columns beside their prompts, more than {_MOST_COLUMNS:,}: name "
            "in data.keep_columns those that rewards read",
        )
    if config.keep_columns != "all" and (unknown := [name for name in config.keep_columns if name not in there]):
        raise DataError(
            config.prompts,
            None,
            f"data.keep_columns names {unknown[0]!r}, but no prompt that is used has such a column",
        )
    return PromptSet(
        uids=uids,
        token_ids=flat((ids for _, ids in kept), np.int32),
        offsets=offsets_of([len(ids) for _, ids in kept]),
        dropped=len(over) if drop else 0,
        truncated=0 if drop else len(over),
        rows=tuple(prompt.row for prompt, _ in kept) if columns else (),
        columns=columns,
    )


@dataclass(frozen=True, slots=True)
class _Prompt(ParsedRow):
    row: bytes
    columns: tuple[str, ...]


class _PromptParser:
    """Turns one row after the other into a prompt's text and the columns that go with it."""

    def __init__(self, tokenizer: Tokenizer, keep_columns: Literal["all"] | tuple[str, ...]) -> None:
        self._chat = ChatRenderer(tokenizer)
        self._keep = keep_columns
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}

    def parse(self, number: int, uid: str, row: dict[str, Any]) -> _Prompt:
        columns = {
            name: value
            for name, value in row.items()
            if name not in PromptData.OWN_COLUMNS and (self._keep == "all" or name in self._keep)
        }
        # Most rows have the same columns: their names are there once.
        names = self._names.setdefault(tuple(columns), tuple(columns))
        return _Prompt(number, uid, (self._text(row),), encoded_columns(columns), names)

    def _text(self, row: dict[str, Any]) -> AnsweredText:
        value = value_of(row, "prompt")
        if isinstance(value, list):
            messages = check_prompt_chat(value, "prompt")
            return AnsweredText(self._chat.render(messages, "prompt", add_generation_prompt=True), is_chat=True)
        if not isinstance(value, str):
            raise RowProblem(f"'prompt' is {kind_of(value)}, but must be text or a list of chat messages")
        return AnsweredText(text_of(row, "prompt"), is_chat=False)
