"""Texts that answer prompts, as tokens: what every loader checks of them.

What the model is taught must be what it will do: answer a prompt. So the tokens before an answer have to be those that
the prompt alone has, and a text has one beginning and one end.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.chat import ChatRenderer, Messages
from rlhf_ray.data.errors import DataError, Findings, RowProblem, raise_all
from rlhf_ray.data.formats import Row
from rlhf_ray.data.sources import parse_rows
from rlhf_ray.data.tokens import Tokenizer, tokenise


@dataclass(frozen=True, slots=True)
class AnsweredText:
    """A text and its answers.

    Attributes:
        text: the whole.
        is_chat: the chat template wrote it, special tokens included.
        answers: for each the text before it and the text up to its end. Without any, all of the text is one.
    """

    text: str
    is_chat: bool
    answers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """A row as text.

    Attributes:
        number, uid: of the row.
        texts: that are tokenised of it.
    """

    number: int
    uid: str
    texts: tuple[AnsweredText, ...]


_Parsed = TypeVar("_Parsed", bound=ParsedRow)
_Made = TypeVar("_Made")


def load_texts(
    source: str,
    setting: str,
    columns: Mapping[str, str],
    parse: Callable[[int, str, Row], _Parsed],
    tokenizer: Tokenizer,
    make: Callable[[_Parsed, list[list[list[int]]]], Iterable[_Made]],
    findings: Findings | None,
) -> tuple[list[_Made], Findings]:
    """Every row of a source through `parse` and then, with the tokens of its texts, through `make`.

    Args:
        source, setting, columns, parse: as for `parse_rows`.
        make: what is made of a row and of what `tokenise_answered` gives of each of its texts; raises `RowProblem` when
            that can't be used.
        findings: what is found, instead of an error for bad rows.

    Returns:
        What was made, and the findings.

    Raises:
        DataErrors: rows can't be used, and no findings are asked for or no row is left.
        DataError: the source can't be read or is empty.
    """
    found = Findings() if findings is None else findings
    rows = parse_rows(source, setting, columns, parse, found)
    tokens = tokenise_answered([text for row in rows for text in row.texts], tokenizer)
    made: list[_Made] = []
    for row in rows:
        tokens_of_row = [next(tokens) for _ in row.texts]
        try:
            made.extend(make(row, tokens_of_row))
        except RowProblem as problem:
            found.problems.append(DataError(source, row.number, str(problem)))
    if findings is None or not made:
        raise_all(source, found.problems)
    return made, found


def render_turns(chat: ChatRenderer, messages: Messages, key: str, turns: Sequence[int], given: int) -> AnsweredText:
    """A conversation as text, in which the messages `turns` are answers.

    Args:
        key: of the row, for errors. Messages are counted in it without the first `given`.

    Raises:
        RowProblem: the template refuses it, or writes what is before an answer otherwise than a prompt for it.
    """
    whole = chat.render(messages, key, add_generation_prompt=False)
    answers = []
    for turn in turns:
        before = chat.render(messages[:turn], key, add_generation_prompt=True)
        after = chat.render(messages[: turn + 1], key, add_generation_prompt=False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise RowProblem(
                f"message {turn - given} of {key!r}: the chat template writes the messages before it differently "
                "once it is there, so a prompt would not be how the conversation begins"
            )
        answers.append((before, after))
    return AnsweredText(whole, is_chat=True, answers=tuple(answers))


def tokenise_answered(texts: Sequence[AnsweredText], tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    """For each text its tokens, then those of the texts before and up to the end of each answer."""
    found: dict[int, list[list[int]]] = {}
    for is_chat in (False, True):
        chosen = [number for number, text in enumerate(texts) if text.is_chat == is_chat]
        parts = [[texts[n].text, *(part for answer in texts[n].answers for part in answer)] for n in chosen]
        # A chat template writes the special tokens itself.
        options = {"add_special_tokens": False} if is_chat else {}
        tokens = iter(tokenise(tokenizer, [part for several in parts for part in several], **options))
        for number, several in zip(chosen, parts, strict=True):
            found[number] = [next(tokens) for _ in several]
    return (found[number] for number in range(len(texts)))


def mark_answers(
    text: AnsweredText, tokens: list[list[int]], tokenizer: Tokenizer
) -> tuple[list[int], NDArray[np.bool_]]:
    """Tokens of a text, plain text with an end, and which of them are of answers; never the first.

    Args:
        tokens: of the text as `tokenise_answered` gives them.

    Raises:
        RowProblem: a special token stands twice, or the tokens before an answer are not its prompt's.
    """
    ids, parts = tokens[0], list(zip(tokens[1::2], tokens[2::2], strict=True))
    check_special_tokens(ids, tokenizer, is_chat=text.is_chat)
    eos = tokenizer.eos_token_id
    if not text.is_chat and eos is not None and ids[-1:] != [eos]:
        ids = [*ids, eos]
    marked = np.zeros(len(ids), bool)
    for before, after in parts:
        if ids[: len(before)] != before or ids[: len(after)] != after:
            same = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
            raise RowProblem(
                f"the tokens of its prompt are not the first tokens of the whole from token {same + 1} on, so the "
                "model would learn to answer a prompt that it never gets: let the prompt end where a token ends, such "
                "as before a space"
            )
        # A plain text has one answer at most, which ends with the end-of-sequence token that was added.
        marked[len(before) : len(after) if text.is_chat else len(ids)] = True
    if not parts:
        marked[:] = True
    marked[:1] = False
    if not marked.any():
        raise RowProblem("has no token to learn with this tokenizer")
    return ids, marked


def check_special_tokens(ids: Sequence[int], tokenizer: Tokenizer, *, is_chat: bool) -> None:
    """Raise `RowProblem` where a beginning-of-sequence or end-of-sequence token stands twice."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    who = "chat template writes" if is_chat else "tokenizer adds"
    if bos is not None and bos != eos and list(ids[:2]) == [bos, bos]:
        raise RowProblem(f"begins with two {tokenizer.bos_token!r}: leave it out, since the {who} one")
    if eos is None:
        return
    if not is_chat and list(ids[-2:]) == [eos, eos]:
        raise RowProblem(f"ends with two {tokenizer.eos_token!r}: leave it out, since the {who} one")
    if is_chat and bos != eos and any(a == b == eos for a, b in pairwise(ids)):
        raise RowProblem(f"has two {tokenizer.eos_token!r} in a row: leave it out of 'content', since the {who} one")
