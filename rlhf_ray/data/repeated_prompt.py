"""Answers that bring their prompt along, as in many public data sets: it must be there once."""

from collections.abc import Mapping

from rlhf_ray.config.data import RepeatedPrompt
from rlhf_ray.data.chat import Messages
from rlhf_ray.data.errors import RowProblem


def texts_without_prompt(prompt: str, answers: Mapping[str, str], rule: RepeatedPrompt) -> dict[str, str]:
    """The answers of a row, without the prompt where all of them begin with the whole of it.

    Args:
        answers: by the key of each in the row.
        rule: `data.repeated_prompt`.

    Raises:
        RowProblem: they do and `rule` is `refuse`, or one is nothing but the prompt.
    """
    if rule == "keep" or not all(_repeats(prompt, answer) for answer in answers.values()):
        return dict(answers)
    if rule == "refuse":
        begin = "begins" if len(answers) == 1 else "begin"
        raise RowProblem(
            f"{' and '.join(map(repr, answers))} {begin} with the whole 'prompt', so it would be there twice: set "
            "data.repeated_prompt to strip, or to keep if that is meant"
        )
    stripped = {key: answer[len(prompt) :] for key, answer in answers.items()}
    for key, answer in stripped.items():
        if not answer.strip():
            raise RowProblem(f"{key!r} is nothing but the prompt")
    return stripped


def messages_of_prompt(prompt: str | Messages, messages: Messages) -> int | None:
    """How many messages at the beginning of a conversation are its prompt, None where it begins otherwise.

    A prompt of messages is the beginning, message by message. A text is the first message that is not the system's,
    but for white space around it.
    """
    if isinstance(prompt, list):
        begins = len(messages) > len(prompt) and all(map(_same, messages, prompt))
        return len(prompt) if begins else None
    place = next((place for place, message in enumerate(messages) if message["role"] != "system"), None)
    if place is None or messages[place]["role"] == "assistant":
        return None
    return place + 1 if messages[place]["content"].strip() == prompt.strip() else None


def _repeats(prompt: str, answer: str) -> bool:
    """Whether it begins with the whole prompt, and not just with a longer word."""
    return answer.startswith(prompt) and not (prompt[-1:].isalnum() and answer[len(prompt) :][:1].isalnum())


def _same(one: dict[str, object], other: dict[str, object]) -> bool:
    return (one["role"], one["content"]) == (other["role"], other["content"])
