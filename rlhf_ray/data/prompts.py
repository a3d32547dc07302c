"""Prompts from a JSONL file, as tokens. A file is used as a whole or not at all: every bad row is named at once."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from rlhf_ray.config.data import PromptData
from rlhf_ray.data.errors import DataError, DataErrors
from rlhf_ray.data.trajectory import Offsets, Tokens, offsets_of

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

# Enough texts to keep a fast tokenizer's threads busy, few enough that its encodings are not held all at once.
_TEXTS_PER_CALL = 1024


class Tokenizer(Protocol):
    """What loading data needs of a Hugging Face tokenizer."""

    name_or_path: str
    chat_template: Any

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...


class RowProblem(Exception):
    """Raised while one row is parsed; `parse_rows` makes a `DataError` with file and line of it."""


@dataclass(frozen=True)
class PromptSet:
    """All prompts that fit. Prompt i is `token_ids[offsets[i]:offsets[i + 1]]`.

    Attributes:
        uids: `[prompts]`, unique.
        token_ids: int32 `[tokens]`.
        offsets: int64 `[prompts + 1]`.
        dropped: prompts left out because they were over the budget.
        truncated: prompts of which only the end is here, because they were over the budget.
    """

    uids: tuple[str, ...]
    token_ids: Tokens
    offsets: Offsets
    dropped: int
    truncated: int

    def __len__(self) -> int:
        return len(self.uids)

    def tokens(self, index: int) -> Tokens:
        """Tokens of one prompt."""
        return self.token_ids[self.offsets[index] : self.offsets[index + 1]]


def load_prompts(config: PromptData, tokenizer: Tokenizer, max_prompt_tokens: int) -> PromptSet:
    """Read and tokenise `config.prompts`.

    A row's prompt is text, tokenised as it is, or a list of chat messages, rendered with the tokenizer's chat
    template up to where the assistant's turn begins. A row without a uid is named after its file and line.

    Args:
        config: the file, its prompt column, and what happens to prompts over the budget.
        tokenizer: the policy's.
        max_prompt_tokens: the budget of one prompt.

    Raises:
        DataErrors: rows are not as described; all of them are listed, and nothing is loaded.
        DataError: the file can't be read or has fewer usable prompts than `config.prompts_per_step`.
    """
    parser = _PromptParser(config, tokenizer)
    prompts = parse_rows(config.prompts, "data.prompts", parser.parse)
    tokens: list[list[int]] = [[]] * len(prompts)
    for is_chat in (False, True):
        chosen = [i for i, prompt in enumerate(prompts) if prompt.is_chat == is_chat]
        # A chat template writes the special tokens itself.
        options = {"add_special_tokens": False} if is_chat else {}
        for i, ids in zip(chosen, tokenise(tokenizer, [prompts[i].text for i in chosen], **options), strict=True):
            tokens[i] = ids
    if empty := [prompt.line for prompt, ids in zip(prompts, tokens, strict=True) if not ids]:
        reason = f"{config.prompt_key!r} gives no tokens with tokenizer {tokenizer.name_or_path!r}"
        raise DataErrors(config.prompts, [DataError(config.prompts, line, reason) for line in empty])

    over = [len(ids) > max_prompt_tokens for ids in tokens]
    drop = config.overlong == "drop"
    kept = [i for i in range(len(prompts)) if not (drop and over[i])]
    rows = [tokens[i][-max_prompt_tokens:] for i in kept]
    done = "dropped" if drop else "truncated to their end"
    report_overlong(config.prompts, "prompts", done, [prompts[i].uid for i, is_over in enumerate(over) if is_over])
    if len(kept) < config.prompts_per_step:
        raise DataError(
            config.prompts,
            None,
            f"{len(kept)} of {len(prompts)} prompts fit the budget of {max_prompt_tokens} tokens, but "
            f"data.prompts_per_step is {config.prompts_per_step}: give more prompts, lower data.prompts_per_step, "
            "raise data.max_prompt_tokens, or set data.overlong to truncate",
        )
    return PromptSet(
        uids=tuple(prompts[i].uid for i in kept),
        token_ids=flat_tokens(rows),
        offsets=offsets_of([len(row) for row in rows]),
        dropped=sum(over) if drop else 0,
        truncated=0 if drop else sum(over),
    )


@dataclass(frozen=True, slots=True)
class _Prompt:
    line: int
    uid: str
    text: str
    is_chat: bool


class _PromptParser:
    """Turns one row after the other into a prompt's text."""

    def __init__(self, config: PromptData, tokenizer: Tokenizer) -> None:
        self._key = config.prompt_key
        self._tokenizer = tokenizer
        self._uids = Uids(config.prompts)
        self._said_no_template = False

    def parse(self, line: int, row: dict[str, Any]) -> _Prompt:
        uid = self._uids.of(line, row)
        if self._key not in row:
            raise RowProblem(
                f"has no {self._key!r} (it has {', '.join(map(repr, row)) or 'nothing'}): see data.prompt_key"
            )
        value = row[self._key]
        if isinstance(value, list):
            return _Prompt(line, uid, self._render(value), is_chat=True)
        if not isinstance(value, str):
            raise RowProblem(f"{self._key!r} is {kind_of(value)}, but must be text or a list of chat messages")
        return _Prompt(line, uid, text_of(row, self._key), is_chat=False)

    def _render(self, messages: list[Any]) -> str:
        _check_chat(messages, self._key)
        if not self._tokenizer.chat_template:
            if self._said_no_template:
                return ""
            self._said_no_template = True
            raise RowProblem(
                f"{self._key!r} is a list of chat messages, but tokenizer {self._tokenizer.name_or_path!r} has no chat "
                "template: give every such prompt as text, or use a model whose tokenizer has a template"
            )
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            raise RowProblem(
                f"{self._key!r} is refused by the chat template of {self._tokenizer.name_or_path!r}: {error}"
            ) from error
        return str(text)


def _check_chat(messages: list[Any], key: str) -> None:
    if not messages:
        raise RowProblem(f"{key!r} is an empty list, but needs at least one chat message")
    for index, message in enumerate(messages):
        where = f"message {index} of {key!r}"
        if not isinstance(message, dict):
            raise RowProblem(f"{where} is {kind_of(message)}, but must be an object with 'role' and 'content'")
        for field in ("role", "content"):
            if field not in message:
                raise RowProblem(f"{where} has no {field!r}")
            if not isinstance(message[field], str):
                raise RowProblem(f"{where}: {field!r} is {kind_of(message[field])}, but must be text")
            _check_encodable(message[field], f"{where}: {field!r}")
        if not message["role"].strip():
            raise RowProblem(f"{where}: 'role' is empty")
    if not any(message["content"].strip() for message in messages):
        raise RowProblem(f"{key!r} has no message with content")
    if messages[-1]["role"] == "assistant":
        raise RowProblem(f"{key!r} ends with an assistant message, but a prompt ends before the assistant's turn")


def parse_rows(file: str, setting: str, parse: Callable[[int, dict[str, Any]], _T]) -> list[_T]:
    """Every line of a JSONL file through `parse(line number, object)`.

    Args:
        file: path; lines are counted from 1.
        setting: dotted path of the config key that names the file, for errors.
        parse: raises `RowProblem` when a row can't be used.

    Raises:
        DataErrors: lines are not JSON objects, or `parse` refused them; all are listed.
        DataError: the file can't be read or is empty.
    """
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise DataError(file, None, f"can't be read ({error.strerror}): see {setting}") from error
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    if not lines:
        raise DataError(file, None, f"is empty, but must have one JSON object a line: see {setting}")
    parsed: list[_T] = []
    errors: list[DataError] = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append(parse(number, _json_object(line)))
        except RowProblem as problem:
            errors.append(DataError(file, number, str(problem)))
    if errors:
        raise DataErrors(file, errors)
    return parsed


def _json_object(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise RowProblem("is blank, but must be a JSON object")
    try:
        value = json.loads(line.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise RowProblem(f"is not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise RowProblem(f"is not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise RowProblem(f"is not JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise RowProblem(f"is {kind_of(value)}, but must be a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RowProblem(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return values


def _no_constant(name: str) -> None:
    raise RowProblem(f"is not JSON: {name} is no JSON value")


class Uids:
    """Gives each row its uid and refuses one that was there before."""

    def __init__(self, file: str) -> None:
        self._stem = Path(file).stem
        self._line_of: dict[str, int] = {}

    def of(self, line: int, row: dict[str, Any]) -> str:
        """The row's `uid`, text or a whole number, else one from the file's name and the line.

        Raises:
            RowProblem: it is neither, is empty or stands twice.
        """
        value = row.get("uid", f"{self._stem}:{line}")
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise RowProblem(f"'uid' is {kind_of(value)}, but must be text or a whole number")
        uid = str(value)
        if not uid.strip():
            raise RowProblem("'uid' is empty")
        _check_encodable(uid, "'uid'")
        if uid in self._line_of:
            raise RowProblem(f"uid {uid!r} stands in line {self._line_of[uid]} already")
        self._line_of[uid] = line
        return uid


def text_of(row: dict[str, Any], key: str) -> str:
    """The text under `key`.

    Raises:
        RowProblem: it is missing, not text or empty.
    """
    if key not in row:
        raise RowProblem(f"has no {key!r} (it has {', '.join(map(repr, row)) or 'nothing'})")
    value = row[key]
    if not isinstance(value, str):
        raise RowProblem(f"{key!r} is {kind_of(value)}, but must be text")
    if not value.strip():
        raise RowProblem(f"{key!r} is empty")
    _check_encodable(value, repr(key))
    return value


def _check_encodable(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(f"{what} has half of a surrogate pair at character {error.start + 1}") from error


def kind_of(value: Any) -> str:
    """A JSON value's type in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


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
