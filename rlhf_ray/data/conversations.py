"""Texts and conversations to learn to write, from a JSONL file, as tokens and a mark on those that are learnt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.data import ConversationData
from rlhf_ray.data.chat import ChatRenderer, Messages, check_chat
from rlhf_ray.data.errors import DataError, DataErrors
from rlhf_ray.data.rows import RowProblem, Uids, kind_of, parse_rows, text_of
from rlhf_ray.data.tokens import Tokenizer, flat_tokens, rows_within_budget, tokenise
from rlhf_ray.data.trajectory import Offsets, Tokens, offsets_of


@dataclass(frozen=True)
class ConversationSet:
    """All rows that fit. Row i is `token_ids[offsets[i]:offsets[i + 1]]`.

    Attributes:
        uids: `[rows]`, unique within a file. A row that is there twice has the same.
        token_ids: int32 `[tokens]`.
        learnt: bool `[tokens]`; the model learns to predict these. Never the first of a row, which nothing predicts.
        offsets: int64 `[rows + 1]`.
        dropped: rows left out because they were over the budget, or cut to it had nothing to learn.
        truncated: rows of which only the beginning is here, because they were over the budget.
    """

    uids: tuple[str, ...]
    token_ids: Tokens
    learnt: NDArray[np.bool_]
    offsets: Offsets
    dropped: int
    truncated: int

    def __len__(self) -> int:
        return len(self.uids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, int64 `[rows]`."""
        return np.diff(self.offsets)

    @property
    def weights(self) -> NDArray[np.int64]:
        """What each row counts in a mean over learnt tokens: their number, int64 `[rows]`."""
        return np.add.reduceat(self.learnt, self.offsets[:-1], dtype=np.int64)

    def first(self, rows: int | None) -> "ConversationSet":
        """The first `rows` rows; None takes all."""
        if rows is None or rows >= len(self):
            return self
        end = self.offsets[rows]
        return replace(
            self,
            uids=self.uids[:rows],
            token_ids=self.token_ids[:end],
            learnt=self.learnt[:end],
            offsets=self.offsets[: rows + 1],
        )

    def tokens(self, row: int) -> Tokens:
        """Tokens of one row."""
        return self.token_ids[self.offsets[row] : self.offsets[row + 1]]

    def learnt_places(self, row: int) -> NDArray[np.int64]:
        """Places of the learnt tokens within their row, int64, ascending."""
        return np.flatnonzero(self.learnt[self.offsets[row] : self.offsets[row + 1]])


def mix(sets: Sequence[tuple[ConversationSet, float]]) -> ConversationSet:
    """One data set of several: of each `weight` times its rows, rounded and at least one, from its beginning on and
    again from there when it is through."""
    if len(sets) == 1 and sets[0][1] == 1:
        return sets[0][0]
    picked = [
        (data, int(row)) for data, weight in sets for row in np.arange(max(1, round(weight * len(data)))) % len(data)
    ]
    return ConversationSet(
        uids=tuple(data.uids[row] for data, row in picked),
        token_ids=np.concatenate([data.tokens(row) for data, row in picked]),
        learnt=np.concatenate([data.learnt[data.offsets[row] : data.offsets[row + 1]] for data, row in picked]),
        offsets=offsets_of([len(data.tokens(row)) for data, row in picked]),
        dropped=sum(data.dropped for data, _ in sets),
        truncated=sum(data.truncated for data, _ in sets),
    )


def load_conversations(config: ConversationData, path: str | Path, tokenizer: Tokenizer) -> ConversationSet:
    """Read and tokenise a file.

    A row has one of

    - `text`: all of it is learnt;
    - `prompt` and `completion`, both text: the completion is learnt;
    - `messages`: a conversation, of which the assistant's turns are learnt, as the chat template writes them after
      the prompt for a turn, with what ends it;
    - `prompt` and `completion`, both lists of messages: one conversation, of which the assistant's turns in the
      completion are learnt.

    `loss: all` learns every token of each. Text ends with the tokenizer's end-of-sequence token, which is added; in a
    conversation the template ends the turns.

    Args:
        config: the budget, what is learnt, and what happens to rows over the budget.
        path: of one file of `config.train`, or `config.eval`.
        tokenizer: the model's.

    Raises:
        DataErrors: rows are not as described, or the tokens before a learnt part are not those that a prompt would
            have; all of them are listed, and nothing is loaded.
        DataError: the file can't be read, or no row fits the budget.
    """
    file = str(path)
    setting = "data.eval" if config.eval is not None and Path(config.eval) == Path(file) else "data.train"
    parser = _Parser(file, tokenizer, learn_all=config.loss == "all")
    rows = parse_rows(file, setting, parser.parse)
    problems: list[DataError] = []
    found: list[tuple[list[int], NDArray[np.bool_]]] = []
    for row, texts in zip(rows, _tokens(rows, tokenizer), strict=True):
        try:
            found.append(_marked(row, texts, tokenizer))
        except RowProblem as problem:
            problems.append(DataError(file, row.line, str(problem)))
    if problems:
        raise DataErrors(file, problems)

    budget = config.max_tokens
    over = [len(ids) > budget for ids, _ in found]
    # Cut to its beginning, a row can end before the first thing to learn.
    useless = [not learnt[:budget].any() for _, learnt in found]
    kept, dropped, truncated = rows_within_budget(
        file, "rows", "beginning", [row.uid for row in rows], over, useless, config
    )
    ids = [found[i][0][:budget] for i in kept]
    return ConversationSet(
        uids=tuple(rows[i].uid for i in kept),
        token_ids=flat_tokens(ids),
        learnt=np.concatenate([found[i][1][:budget] for i in kept]),
        offsets=offsets_of([len(row) for row in ids]),
        dropped=dropped,
        truncated=truncated,
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """A row as text. `learnt` are its learnt parts: the text before each, and the text up to its end. All of the
    row is learnt when there is none."""

    line: int
    uid: str
    text: str
    is_chat: bool
    learnt: tuple[tuple[str, str], ...] = ()


class _Parser:
    """Turns one row after the other into text."""

    def __init__(self, file: str, tokenizer: Tokenizer, *, learn_all: bool) -> None:
        self._uids = Uids(file)
        self._chat = ChatRenderer(tokenizer)
        self._learn_all = learn_all

    def parse(self, line: int, row: dict[str, Any]) -> _Row:
        uid = self._uids.of(line, row)
        kinds = [kind for kind in ("text", "messages", "prompt") if kind in row]
        if len(kinds) != 1:
            raise RowProblem(
                f"has {' and '.join(map(repr, kinds)) if kinds else ', '.join(map(repr, row)) or 'nothing'}, but must "
                "have one of 'text', 'messages', or 'prompt' with 'completion'"
            )
        if "text" in row:
            return _Row(line, uid, text_of(row, "text"), is_chat=False)
        if "messages" in row:
            return self._conversation(line, uid, check_chat(_list_of(row, "messages"), "messages"), "messages", given=0)
        if "completion" not in row:
            raise RowProblem("has 'prompt', but no 'completion'")
        if isinstance(row["prompt"], list) != isinstance(row["completion"], list):
            raise RowProblem(
                f"'prompt' is {kind_of(row['prompt'])} and 'completion' is {kind_of(row['completion'])}, but both must "
                "be text or both lists of chat messages"
            )
        if isinstance(row["prompt"], list):
            given, answer = check_chat(row["prompt"], "prompt"), check_chat(row["completion"], "completion")
            return self._conversation(line, uid, given + answer, "completion", given=len(given))
        prompt, completion = text_of(row, "prompt"), text_of(row, "completion")
        learnt = () if self._learn_all else ((prompt, prompt + completion),)
        return _Row(line, uid, prompt + completion, is_chat=False, learnt=learnt)

    def _conversation(self, line: int, uid: str, messages: Messages, key: str, *, given: int) -> _Row:
        """`given` messages at the beginning are not learnt."""
        turns = [i for i in range(given, len(messages)) if messages[i]["role"] == "assistant"]
        if not turns and not self._learn_all:
            raise RowProblem(f"{key!r} has no assistant message, so there is nothing to learn")
        for turn in turns:
            if not messages[turn]["content"].strip():
                raise RowProblem(f"message {turn - given} of {key!r}: the assistant's 'content' is empty")
        if turns and turns[0] == 0:
            raise RowProblem(f"{key!r} begins with an assistant message, which answers nothing")
        whole = self._chat.render(messages, key, add_generation_prompt=False)
        if self._learn_all:
            return _Row(line, uid, whole, is_chat=True)
        learnt = []
        for turn in turns:
            before = self._chat.render(messages[:turn], key, add_generation_prompt=True)
            after = self._chat.render(messages[: turn + 1], key, add_generation_prompt=False)
            if not (after.startswith(before) and whole.startswith(after)):
                raise RowProblem(
                    f"message {turn - given} of {key!r}: the chat template writes the messages before it differently "
                    "once it is there, so a prompt would not be how the conversation begins"
                )
            learnt.append((before, after))
        return _Row(line, uid, whole, is_chat=True, learnt=tuple(learnt))


def _list_of(row: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(row[key], list):
        raise RowProblem(f"{key!r} is {kind_of(row[key])}, but must be a list of chat messages")
    return list(row[key])


def _tokens(rows: Sequence[_Row], tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    """For each row the tokens of its text, then of the texts before and up to the end of each learnt part."""
    found: dict[int, list[list[int]]] = {}
    for is_chat in (False, True):
        chosen = [number for number, row in enumerate(rows) if row.is_chat == is_chat]
        texts = [[rows[n].text, *(text for part in rows[n].learnt for text in part)] for n in chosen]
        # A chat template writes the special tokens itself.
        options = {"add_special_tokens": False} if is_chat else {}
        tokens = iter(tokenise(tokenizer, [text for several in texts for text in several], **options))
        for number, several in zip(chosen, texts, strict=True):
            found[number] = [next(tokens) for _ in several]
    return (found[number] for number in range(len(rows)))


def _marked(row: _Row, texts: list[list[int]], tokenizer: Tokenizer) -> tuple[list[int], NDArray[np.bool_]]:
    """Tokens of a row and which are learnt.

    Raises:
        RowProblem: a special token stands twice, or the tokens before a learnt part are not its prompt's.
    """
    ids, parts = texts[0], list(zip(texts[1::2], texts[2::2], strict=True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and bos != eos and ids[:2] == [bos, bos]:
        raise RowProblem(f"begins with two {tokenizer.bos_token!r}: leave it out, since the tokenizer adds one")
    if not row.is_chat and eos is not None:
        if ids[-2:] == [eos, eos]:
            raise RowProblem(f"ends with two {tokenizer.eos_token!r}: leave it out, since the tokenizer adds one")
        if ids[-1:] != [eos]:
            ids = [*ids, eos]
    learnt = np.zeros(len(ids), bool)
    for before, after in parts:
        if ids[: len(before)] != before or ids[: len(after)] != after:
            same = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
            raise RowProblem(
                f"the tokens of its prompt are not the first tokens of the whole from token {same + 1} on, so the "
                "model would learn to answer a prompt that it never gets: let the prompt end where a token ends, such "
                "as before a space"
            )
        # A text has one part at most, which ends with the end-of-sequence token that was added.
        learnt[len(before) : len(after) if row.is_chat else len(ids)] = True
    if not parts:
        learnt[:] = True
    learnt[:1] = False
    if not learnt.any():
        raise RowProblem("has no token to learn with this tokenizer")
    return ids, learnt
