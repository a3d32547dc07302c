"""Chat messages: their form, and their text by a tokenizer's template."""

from typing import Any

from rlhf_ray.data.errors import KnownProblem, RowProblem
from rlhf_ray.data.rows import check_encodable, kind_of
from rlhf_ray.data.tokens import Tokenizer

Messages = list[dict[str, Any]]


class ChatRenderer:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._said_no_template = False

    def render(self, messages: Messages, key: str, *, add_generation_prompt: bool) -> str:
        """Text of the messages, which ends where the assistant's turn begins when `add_generation_prompt`.

        Raises:
            RowProblem: it refuses these messages, or there is none.
            KnownProblem: there is none, and that was said before.
        """
        if not self._tokenizer.chat_template:
            kind = KnownProblem if self._said_no_template else RowProblem
            self._said_no_template = True
            raise kind(
                f"{key!r} is a list of chat messages, but tokenizer {self._tokenizer.name_or_path!r} has no chat "
                "template: give every such prompt as text, or use a model whose tokenizer has a template"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise what they like
            raise RowProblem(
                f"{key!r} is refused by the chat template of {self._tokenizer.name_or_path!r}: {error}"
            ) from error
        return str(text)


def check_chat(messages: list[Any], key: str) -> Messages:
    """The messages, when each is an object with text under `role` and `content` and not all are empty.

    Raises:
        RowProblem: naming the message.
    """
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
            check_encodable(message[field], f"{where}: {field!r}")
        if not message["role"].strip():
            raise RowProblem(f"{where}: 'role' is empty")
    if not any(message["content"].strip() for message in messages):
        raise RowProblem(f"{key!r} has no message with content")
    return messages


def check_prompt_chat(messages: list[Any], key: str) -> Messages:
    """As `check_chat`, for messages that an assistant is to answer.

    Raises:
        RowProblem: also when the last of them is the assistant's.
    """
    if check_chat(messages, key)[-1]["role"] == "assistant":
        raise RowProblem(f"{key!r} ends with an assistant message, but a prompt ends before the assistant's turn")
    return messages
