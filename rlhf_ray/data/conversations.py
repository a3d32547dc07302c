"""Texts and conversations to learn to write, as tokens and a mark on those that are learnt."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.data import ConversationData, RepeatedPrompt
from rlhf_ray.data.answers import AnsweredText, ParsedRow, load_texts, mark_answers, render_turns
from rlhf_ray.data.chat import ChatRenderer, Messages, check_chat
from rlhf_ray.data.errors import Findings, RowProblem
from rlhf_ray.data.repeated_prompt import messages_of_prompt, texts_without_prompt
from rlhf_ray.data.rows import kind_of, text_of
from rlhf_ray.data.sources import setting_of
from rlhf_ray.data.tokens import Tokenizer, rows_within_budget
from rlhf_ray.data.trajectory import Offsets, Tokens, flat, offsets_of


@dataclass(frozen=True)
class ConversationSet:
    """All rows that fit. Row i is `token_ids[offsets[i]:offsets[i + 1]]`.

    Attributes:
        uids: `[rows]`, unique within a source. A row that is there twice has the same.
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

    @classmethod
    def of(
        cls, rows: Iterable[tuple[str, Sequence[int] | Tokens, NDArray[np.bool_]]], *, dropped: int, truncated: int
    ) -> Self:
        """From uid, tokens, and the mark on those that are learnt, of each row."""
        uids, ids, learnt = zip(*rows, strict=True)
        return cls(
            uids, flat(ids, np.int32), np.concatenate(learnt), offsets_of(list(map(len, ids))), dropped, truncated
        )

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

    def learnt_of(self, row: int) -> NDArray[np.bool_]:
        """Which tokens of one row are learnt."""
        return self.learnt[self.offsets[row] : self.offsets[row + 1]]

    def learnt_places(self, row: int) -> NDArray[np.int64]:
        """Places of the learnt tokens within their row, int64, ascending."""
        return np.flatnonzero(self.learnt_of(row))


def mix(sets: Sequence[tuple[ConversationSet, float]]) -> ConversationSet:
    """One data set of several: of each `weight` times its rows, rounded and at least one, from its beginning on and
    again from there when it is through."""
    if len(sets) == 1 and sets[0][1] == 1:
        return sets[0][0]
    picked = [
        (data, int(row)) for data, weight in sets for row in np.arange(max(1, round(weight * len(data)))) % len(data)
    ]
    return ConversationSet.of(
        ((data.uids[row], data.tokens(row), data.learnt_of(row)) for data, row in picked),
        dropped=sum(data.dropped for data, _ in sets),
        truncated=sum(data.truncated for data, _ in sets),
    )


def load_conversations(
    config: ConversationData, path: str | Path, tokenizer: Tokenizer, findings: Findings | None = None
) -> ConversationSet:
    """Read and tokenise a source.

    A row has one of

    - `text`: all of it is learnt;
    - `prompt` and `completion`, both text: the completion is learnt;
    - `messages`: a conversation, of which the assistant's turns are learnt, as the chat template writes them after
      the prompt for a turn, with what ends it;
    - `prompt` and `completion`, both lists of messages: one conversation, of which the assistant's turns in the
      completion are learnt. A completion may begin with the prompt, which may then be text, too.

    `loss: all` learns every token of each. Text ends with the tokenizer's end-of-sequence token, which is added; in a
    conversation the template ends the turns.

    Args:
        config: columns, the budget, what is learnt, and what happens to rows over the budget.
        path: one of `config.sources`, or `config.eval`.
        tokenizer: the model's.
        findings: what is found, instead of an error for bad rows.

    Raises:
        DataErrors: rows are not as described, or the tokens before a learnt part are not those that a prompt would
            have; all of them are listed, and nothing is loaded.
        DataError: the source can't be read, or no row fits the budget.
    """
    source = str(path)
    parser = ConversationParser(tokenizer, learn_all=config.loss == "all", repeated_prompt=config.repeated_prompt)

    def marked(row: ParsedRow, tokens: list[list[list[int]]]) -> list[tuple[str, list[int], NDArray[np.bool_]]]:
        return [(row.uid, *mark_answers(row.texts[0], tokens[0], tokenizer))]

    rows, found = load_texts(
        source, setting_of(config, source), config.columns, parser.parse, tokenizer, marked, findings
    )
    uids, lengths = [uid for uid, _, _ in rows], [len(ids) for _, ids, _ in rows]
    budget = config.max_tokens
    # Cut to its beginning, a row can end before the first thing to learn.
    useless = [not learnt[:budget].any() for _, _, learnt in rows]
    kept, dropped, truncated = rows_within_budget(source, "beginning", uids, lengths, useless, config, found)
    cut = ((uid, ids[:budget], learnt[:budget]) for uid, ids, learnt in (rows[place] for place in kept))
    return ConversationSet.of(cut, dropped=dropped, truncated=truncated)


class ConversationParser:
    """Turns one row after the other into text."""

    def __init__(self, tokenizer: Tokenizer, *, learn_all: bool, repeated_prompt: RepeatedPrompt = "refuse") -> None:
        self._chat = ChatRenderer(tokenizer)
        self._learn_all = learn_all
        self._repeated_prompt = repeated_prompt

    def parse(self, number: int, uid: str, row: dict[str, Any]) -> ParsedRow:
        """A row as text with what is learnt of it.

        Raises:
            RowProblem: it is not as `load_conversations` says.
        """
        return ParsedRow(number, uid, (self._text(row),))

    def _text(self, row: dict[str, Any]) -> AnsweredText:
        kinds = [kind for kind in ("text", "messages", "prompt") if kind in row]
        if len(kinds) != 1:
            raise RowProblem(
                f"has {' and '.join(map(repr, kinds)) if kinds else ', '.join(map(repr, row)) or 'nothing'}, but must "
                "have one of 'text', 'messages', or 'prompt' with 'completion'"
            )
        if "text" in row:
            return AnsweredText(text_of(row, "text"), is_chat=False)
        if "messages" in row:
            return self._conversation(check_chat(_list_of(row, "messages"), "messages"), "messages", given=0)
        if "completion" not in row:
            raise RowProblem("has 'prompt', but no 'completion'")
        if isinstance(row["completion"], list):
            answer = check_chat(row["completion"], "completion")
            given = check_chat(row["prompt"], "prompt") if isinstance(row["prompt"], list) else text_of(row, "prompt")
            repeated = messages_of_prompt(given, answer)
            if repeated is not None:
                return self._conversation(answer, "completion", given=repeated)
            if isinstance(given, list):
                return self._conversation(given + answer, "completion", given=len(given))
        if isinstance(row["prompt"], list) or isinstance(row["completion"], list):
            raise RowProblem(
                f"'prompt' is {kind_of(row['prompt'])} and 'completion' is {kind_of(row['completion'])}, but both must "
                "be text or both lists of chat messages, unless the completion begins with the prompt"
            )
        prompt, completion = text_of(row, "prompt"), text_of(row, "completion")
        completion = texts_without_prompt(prompt, {"completion": completion}, self._repeated_prompt)["completion"]
        learnt = () if self._learn_all else ((prompt, prompt + completion),)
        return AnsweredText(prompt + completion, is_chat=False, answers=learnt)

    def _conversation(self, messages: Messages, key: str, *, given: int) -> AnsweredText:
        """`given` messages at the beginning are not learnt."""
        turns = [i for i in range(given, len(messages)) if messages[i]["role"] == "assistant"]
        if not turns and not self._learn_all:
            raise RowProblem(f"{key!r} has no assistant message, so there is nothing to learn")
        for turn in turns:
            if not messages[turn]["content"].strip():
                raise RowProblem(f"message {turn - given} of {key!r}: the assistant's 'content' is empty")
        if turns and turns[0] == 0:
            raise RowProblem(f"{key!r} begins with an assistant message, which answers nothing")
        return render_turns(self._chat, messages, key, () if self._learn_all else turns, given)


def _list_of(row: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(row[key], list):
        raise RowProblem(f"{key!r} is {kind_of(row[key])}, but must be a list of chat messages")
    return list(row[key])
