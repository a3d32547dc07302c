"""Chat messages: their form, and their text by a tokenizer's template."""

from typing import Any

from rlhf_ray.data.errors import KnownProblem, RowProblem
from rlhf_ray.data.rows import check_encodable, kind_of
from rlhf_ray.data.template_process import TEMPLATES, TemplateLimitError
from rlhf_ray.data.tokens import Tokenizer

Messages = list[dict[str, Any]]

# The text before each turn is rendered and tokenised, which takes time with the square of the number of turns.
_MOST_MESSAGES = 1000


class ChatRenderer:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._useless = False

    def render(self, messages: Messages, key: str, *, add_generation_prompt: bool) -> str:
        """Text of the messages, which ends where the assistant's turn begins when `add_generation_prompt`.

        Raises:
            RowProblem: the template refuses these messages or ran into a limit, or there is none.
            KnownProblem: there is none or it ran into a limit, and that was said before.
        """
        name = self._tokenizer.name_or_path
        if self._useless:
            raise KnownProblem(f"{key!r} is a list of chat messages, and the chat template of {name!r} can't be used")
        if not self._tokenizer.chat_template:
            self._useless = True
            raise RowProblem(
                f"{key!r} is a list of chat messages, but tokenizer {name!r} has no chat "
                "template: give every such prompt as text, or use a model whose tokenizer has a template"
            )
        try:
            text = self._rendered(messages, add_generation_prompt=add_generation_prompt)
        except TemplateLimitError as error:
            self._useless = True
            raise RowProblem(
                f"the chat template of {name!r} can't be used: {error} ({key!r} of this row; others were not tried): "
                "correct the template, which stands in the model's folder"
            ) from error
        except Exception as error:  # templates raise what they like
            raise RowProblem(f"{key!r} is refused by the chat template of {name!r}: {error}") from error
        check_encodable(text, f"{key!r}, as the chat template of {name!r} writes it,")
        return text

    def _rendered(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        if _has_own_code(self._tokenizer):
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        return TEMPLATES.render(
            self._tokenizer.get_chat_template(),
            self._tokenizer.special_tokens_map,
            messages,
            add_generation_prompt=add_generation_prompt,
        )


def _has_own_code(tokenizer: Tokenizer) -> bool:
    """Whether code that was trusted writes the text, instead of transformers' own by the template."""
    from transformers import PreTrainedTokenizerBase

    return getattr(type(tokenizer), "apply_chat_template", None) is not PreTrainedTokenizerBase.apply_chat_template


def check_chat(messages: list[Any], key: str) -> Messages:
    """The messages, when each is an object with text under `role` and `content` and not all are empty.

    Raises:
        RowProblem: naming the message.
    """
    if not messages:
        raise RowProblem(f"{key!r} is an empty list, but needs at least one chat message")
    if len(messages) > _MOST_MESSAGES:
        raise RowProblem(f"{key!r} has {len(messages):,} messages, but may have {_MOST_MESSAGES:,} at most")
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
