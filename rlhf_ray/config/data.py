"""Prompts for PPO, labelled pairs for reward models, conversations to imitate."""

from typing import Literal

from pydantic import model_validator

from rlhf_ray.config.base import PositiveFloat, PositiveInt, Section


class PromptData(Section):
    """Prompts and how many of them make a step."""

    prompts: str
    """JSONL file; a row has `prompt` (text, or a list of chat messages) and optionally `uid`."""
    prompt_key: str = "prompt"
    """Column of the prompt."""
    prompts_per_step: PositiveInt = 128
    """Prompts in one PPO step."""
    samples_per_prompt: PositiveInt = 1
    """Responses to each prompt."""
    max_prompt_tokens: PositiveInt | None = None
    """Budget of a prompt; by default what `rollout.engine.max_model_len` leaves beside the longest response."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to a prompt over the budget; `truncate` keeps its end. Both are counted and reported."""
    shuffle: bool = True
    """New order in each epoch, from the run's seed."""


class ComparisonData(Section):
    """Pairs of texts of which a human liked one better."""

    train: str
    """JSONL file; a row has `chosen` and `rejected` (text) and optionally `prompt` and `uid`."""
    train_rows: PositiveInt | None = None
    """Pairs of `train` that are used, from its beginning; by default all."""
    eval: str | None = None
    """JSONL file of held-out pairs."""
    eval_rows: PositiveInt | None = None
    """Pairs of `eval` that are used, from its beginning; by default all."""
    rows_per_step: PositiveInt = 32
    """Pairs in one optimizer step."""
    max_tokens: PositiveInt = 1024
    """Budget of one text with its prompt."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to a pair over the budget; `truncate` keeps the end of each text. Both are reported."""


class PreferenceData(ComparisonData):
    """Answers that people preferred to others, or judged one by one."""

    train: str
    """JSONL file; a row has `chosen` and `rejected` and mostly `prompt`, or `prompt`, `completion` and `label`."""
    max_tokens: PositiveInt = 1024
    """Budget of one answer with its prompt."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to a row over the budget; `truncate` keeps the beginning of each answer. Both are reported."""


class ConversationSource(Section):
    """One of several files of rows."""

    path: str
    """JSONL file."""
    weight: PositiveFloat = 1.0
    """How often an epoch has each row: 2 has all twice, 0.5 the first half of the file once."""


class ConversationData(Section):
    """Texts and conversations to learn to write."""

    train: str | tuple[ConversationSource, ...]
    """JSONL file, or several with weights; a row has `text`, or `messages` (a list of chat messages), or `prompt` and
    `completion` (both text or both lists of chat messages), and optionally `uid`."""
    train_rows: PositiveInt | None = None
    """Rows of each file of `train` that are used, from its beginning; by default all."""
    eval: str | None = None
    """JSONL file of held-out rows."""
    eval_rows: PositiveInt | None = None
    """Rows of `eval` that are used, from its beginning; by default all."""
    rows_per_step: PositiveInt = 32
    """Rows in one optimizer step."""
    loss: Literal["assistant", "all"] = "assistant"
    """What is learnt: `assistant` the assistant's turns and completions (and all of `text`), `all` every token."""
    max_tokens: PositiveInt = 1024
    """Budget of one row."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to a row over the budget; `truncate` keeps its beginning. Both are counted and reported."""

    @property
    def sources(self) -> tuple[ConversationSource, ...]:
        """The files to train on."""
        return (ConversationSource(path=self.train),) if isinstance(self.train, str) else self.train

    @model_validator(mode="after")
    def _has_a_source(self) -> "ConversationData":
        if not self.sources:
            raise ValueError(".train is empty, but needs at least one file")
        return self
