"""What a row of a comparison says: its candidates as text, which is better, by how much, and what that counts."""

import json
import math
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from rlhf_ray.config.data import ComparisonKind, RepeatedPrompt
from rlhf_ray.data.answers import AnsweredText, ParsedRow, render_turns
from rlhf_ray.data.chat import ChatRenderer, Messages, check_chat, check_prompt_chat
from rlhf_ray.data.errors import RowProblem
from rlhf_ray.data.repeated_prompt import messages_of_prompt, texts_without_prompt
from rlhf_ray.data.rows import checked_text, kind_of, value_of
from rlhf_ray.data.tokens import Tokenizer

# Ranks are kept in 64 bits and margins in float32, and weights of many rows are summed.
_WORST_RANK = 2**31 - 1
_LARGEST = 1e30


@dataclass(frozen=True, slots=True)
class Comparison(ParsedRow):
    """One row. Its texts are `[candidates]`; for kind `rewards` without a mark on the answer.

    Attributes:
        keys: `[candidates]`, where each stands in the row, for errors.
        ranks: `[candidates]`, 0 for the best.
        margin, weight: 0 and 1 where the row does not say.
    """

    keys: tuple[str, ...]
    ranks: tuple[int, ...]
    margin: float
    weight: float


class ComparisonParser:
    """Turns one row after the other into a `Comparison`."""

    def __init__(self, kind: ComparisonKind, tokenizer: Tokenizer, repeated_prompt: RepeatedPrompt = "refuse") -> None:
        self._kind = kind
        self._repeated_prompt = repeated_prompt
        self._chat = ChatRenderer(tokenizer)

    def parse(self, number: int, uid: str, row: dict[str, Any]) -> Comparison:
        """A row as text.

        Raises:
            RowProblem: it is not as `load_comparisons` says.
        """
        if self._kind == "rewards" and "completions" in row:
            if both := [key for key in ("chosen", "rejected", "tie") if key in row]:
                raise RowProblem(f"has 'completions' and {both[0]!r}, but must have a ranking or a pair")
            completions = _completions(row)
            answers = {f"completions.{i}": completion for i, completion in enumerate(completions)}
            ranks = _ranks(row, len(completions))
        elif self._kind == "labels" and "chosen" not in row and "rejected" not in row:
            answers = {"completion": value_of(row, "completion")}
            ranks = (0 if _truth(row, "label") else 1,)
            value_of(row, "prompt")
        else:
            answers = {key: value_of(row, key) for key in ("chosen", "rejected")}
            is_tie = self._kind == "rewards" and "tie" in row and _truth(row, "tie")
            ranks = (0, 0) if is_tie else (0, 1)
        margin = _number(row, "margin") if "margin" in row else self._rating_margin(row, ranks)
        weight = _number(row, "weight") if "weight" in row else 1.0
        if margin < 0:
            raise RowProblem(f"'margin' is {margin:g}, but must be at least 0")
        if margin and len(set(ranks)) == 1:
            raise RowProblem(f"'margin' is {margin:g}, but nothing in the row is better than the rest")
        if weight <= 0:
            raise RowProblem(f"'weight' is {weight:g}, but must be more than 0")
        given = {"prompt": row["prompt"]} if "prompt" in row else {}
        return Comparison(number, uid, self._texts(given, answers), tuple(answers), ranks, margin, weight)

    def _rating_margin(self, row: dict[str, Any], ranks: tuple[int, ...]) -> float:
        """By how much the chosen text was rated higher; 0 for a tie, and where the row has no ratings."""
        names = ("chosen_rating", "rejected_rating")
        if self._kind == "labels" or ranks != (0, 1) or any(row.get(name) is None for name in names):
            return 0.0
        chosen, rejected = (_number(row, name) for name in names)
        if chosen < rejected:
            raise RowProblem(f"'chosen_rating' is {chosen:g}, less than 'rejected_rating', which is {rejected:g}")
        return chosen - rejected

    def _texts(self, given: dict[str, Any], answers: dict[str, Any]) -> tuple[AnsweredText, ...]:
        for key, value in (given | answers).items():
            if not isinstance(value, str | list):
                raise RowProblem(f"{key!r} is {kind_of(value)}, but must be text or a list of chat messages")
        are_chats = all(isinstance(value, list) for value in answers.values())
        if not (are_chats or all(isinstance(value, str) for value in (given | answers).values())):
            kinds = " and ".join(f"{key!r} is {kind_of(value)}" for key, value in (given | answers).items())
            raise RowProblem(f"{kinds}, but all must be text or all lists of chat messages")
        for key, value in (given | answers).items():
            check_chat(value, key) if isinstance(value, list) else checked_text(value, key)
        prompt = given.get("prompt")
        if are_chats:
            prompt = _prompt_apart(prompt, answers)
        elif prompt is not None:
            answers = texts_without_prompt(prompt, answers, self._repeated_prompt)
        _check_different(answers)
        return self._chats(prompt, answers) if are_chats else self._plain_texts(prompt, answers)

    def _chats(self, prompt: Messages | None, answers: dict[str, Messages]) -> tuple[AnsweredText, ...]:
        """But for `rewards`, one message of each list of answers answers; without a prompt, what is before it is the
        prompt."""
        whole = self._kind == "rewards"
        if prompt is not None and not whole:
            check_prompt_chat(prompt, "prompt")
        given = prompt or []
        texts = []
        for key, messages in answers.items():
            _check_last(messages, key)
            if not whole:
                _check_one_answer(prompt, answers, key)
            turns = () if whole else (len(given) + len(messages) - 1,)
            texts.append(render_turns(self._chat, given + messages, key, turns, len(given)))
        return tuple(texts)

    def _plain_texts(self, prompt: str | None, answers: dict[str, str]) -> tuple[AnsweredText, ...]:
        """But for `rewards`, answers to the prompt; without one, texts that begin with a common one."""
        if self._kind == "rewards":
            return tuple(AnsweredText((prompt or "") + answer, is_chat=False) for answer in answers.values())
        if prompt is None:
            prompt = _common_prompt(*answers.values())
            answers = {key: text[len(prompt) :] for key, text in answers.items()}
            for key, answer in answers.items():
                if not answer.strip():
                    raise RowProblem(f"{key!r} is nothing but what both begin with, so its answer is empty")
        wholes = [prompt + answer for answer in answers.values()]
        return tuple(AnsweredText(whole, is_chat=False, answers=((prompt, whole),)) for whole in wholes)


def _prompt_apart(prompt: str | Messages | None, answers: dict[str, Messages]) -> Messages | None:
    """The prompt when the conversations do not begin with it, None when they do and it is there once with them.

    Raises:
        RowProblem: some do and some do not, or it is text and they do not.
    """
    if prompt is None:
        return None
    without = [key for key, messages in answers.items() if messages_of_prompt(prompt, messages) is None]
    if not without:
        return None
    if isinstance(prompt, str):
        raise RowProblem(
            f"'prompt' is text, but the messages of {without[0]!r} do not begin with it: let their first message be "
            "the user's with that text, or make 'prompt' a list of chat messages"
        )
    if len(without) < len(answers):
        key = next(key for key in answers if key not in without)
        raise RowProblem(f"{key!r} begins with the messages of 'prompt', but {without[0]!r} does not")
    return prompt


def _check_one_answer(prompt: Messages | None, answers: dict[str, Messages], key: str) -> None:
    """Messages must be one answer to the prompt; without one, a conversation that ends in an answer to a common one."""
    messages = answers[key]
    if prompt is not None:
        if len(messages) > 1:
            raise RowProblem(
                f"{key!r} has {len(messages)} messages, but an answer is one of the assistant: what comes before "
                "it belongs into 'prompt'"
            )
        return
    if messages[:-1] != next(iter(answers.values()))[:-1]:
        keys = " and ".join(map(repr, answers))
        raise RowProblem(f"{keys} differ before their last messages, so they answer no common prompt")
    if len(messages) == 1:
        raise RowProblem(f"{key!r} is one message and there is no 'prompt', so it answers nothing")
    check_prompt_chat(messages[:-1], f"{key} without its last message")


def _common_prompt(chosen: str, rejected: str) -> str:
    """What both begin with, up to the last white space: there a token ends, with most tokenizers."""
    pairs = zip(chosen, rejected, strict=False)
    same = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    last_word = "" if same[-1:].isspace() else (same.split() or [""])[-1]
    if not (prompt := same[: len(same) - len(last_word)].rstrip()):
        raise RowProblem("has no 'prompt', and 'chosen' and 'rejected' begin with different words: give a prompt")
    return prompt


def _check_last(messages: Messages, key: str) -> None:
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowProblem(f"{key!r} ends with a message of {last['role']!r}, but an answer is the assistant's")
    if not last["content"].strip():
        raise RowProblem(f"message {len(messages) - 1} of {key!r}: the assistant's 'content' is empty")


def _check_different(answers: dict[str, Any]) -> None:
    seen: dict[str, str] = {}
    for key, answer in answers.items():
        text = answer if isinstance(answer, str) else json.dumps(answer, sort_keys=True, default=str)
        if text in seen:
            raise RowProblem(f"{seen[text]!r} and {key!r} are the same text, so there is nothing to prefer")
        seen[text] = key


def _completions(row: dict[str, Any]) -> list[Any]:
    completions = row["completions"]
    if not isinstance(completions, list):
        raise RowProblem(f"'completions' is {kind_of(completions)}, but must be a list")
    if len(completions) < 2:
        raise RowProblem(f"'completions' has {len(completions)} entries, but must have at least 2 to compare")
    return completions


def _ranks(row: dict[str, Any], count: int) -> tuple[int, ...]:
    """Of `ranks`, or of `best`, which ties all others."""
    if ("ranks" in row) == ("best" in row):
        raise RowProblem(f"has {'both' if 'best' in row else 'neither'} of 'ranks' and 'best', but must have one")
    if "best" in row:
        best = row["best"]
        if isinstance(best, bool) or not isinstance(best, int):
            raise RowProblem(f"'best' is {kind_of(best)}, but must be the place of the best completion, from 0")
        if not 0 <= best < count:
            raise RowProblem(f"'best' is {_short(best)}, but there are completions 0 to {count - 1}")
        return tuple(0 if place == best else 1 for place in range(count))
    ranks = row["ranks"]
    if not isinstance(ranks, list):
        raise RowProblem(f"'ranks' is {kind_of(ranks)}, but must be a list of whole numbers")
    if len(ranks) != count:
        raise RowProblem(f"'ranks' has {len(ranks)} entries, but 'completions' has {count}")
    for place, rank in enumerate(ranks):
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            shown = _short(rank) if type(rank) in (int, float) else kind_of(rank)
            raise RowProblem(f"entry {place} of 'ranks' is {shown}, but must be a whole number, 0 for the best")
        if rank > _WORST_RANK:
            raise RowProblem(f"entry {place} of 'ranks' is {_short(rank)}, but may be {_WORST_RANK} at most")
    if 0 not in ranks:
        raise RowProblem(f"'ranks' begin at {min(ranks)}, but the best completion has rank 0")
    return tuple(ranks)


def _truth(row: dict[str, Any], key: str) -> bool:
    value = value_of(row, key)
    if not isinstance(value, bool):
        raise RowProblem(f"{key!r} is {kind_of(value)}, but must be true or false")
    return value


def _number(row: dict[str, Any], key: str) -> float:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowProblem(f"{key!r} is {kind_of(value)}, but must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowProblem(f"{key!r} is {number}, but must be a finite number")
    if abs(number) > _LARGEST:
        raise RowProblem(f"{key!r} is {number:g}, but may be {_LARGEST:g} at most")
    return number


def _short(number: float) -> str:
    """A number for a message; of many digits only their number."""
    text = str(number)
    return text if len(text) <= 30 else f"a number of {len(text.lstrip('-'))} digits"
