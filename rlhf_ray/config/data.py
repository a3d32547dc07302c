"""Prompts for PPO, labelled pairs for reward models, conversations to imitate. docs/data.md has the form of rows."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.base import PositiveFloat, PositiveInt, RowCount, Section, suggestion
from rlhf_ray.config.paths import UsablePath

# What comparisons are for: to score whole texts, to prefer one answer to another, to judge single answers.
ComparisonKind = Literal["rewards", "pairs", "labels"]

# What happens to answers in plain text that begin with their whole prompt.
RepeatedPrompt = Literal["refuse", "strip", "keep"]

DEFAULT_SHUFFLE_BUFFER = 1000


class RowData(Section):
    """What every data section has: `columns` for files whose columns have other names than `OWN_COLUMNS`."""

    OWN_COLUMNS: ClassVar[tuple[str, ...]]

    @field_validator("columns", check_fields=False)
    @classmethod
    def _columns_are_known(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in cls.OWN_COLUMNS:
                hint = suggestion(name, cls.OWN_COLUMNS)
                raise ValueError(f"{name!r} is none of our columns; {hint} (our name stands before the file's)")
        return columns


class PromptData(RowData):
    """Prompts and how many of them make a step."""

    OWN_COLUMNS = ("uid", "prompt")

    prompts: UsablePath
    """Source of rows with `prompt` (text, or a list of chat messages): a JSONL, JSON, CSV or Parquet file, a folder of
    `datasets.save_to_disk`, or a name on the hub."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our columns that the source names otherwise: `{prompt: question}`."""
    keep_columns: Literal["all"] | tuple[str, ...] = "all"
    """Other columns of a row, by the source's names, that travel with its samples to reward functions, services and
    `samples.jsonl`: `all`, or a list. Those of one row may take 64 KiB as JSON."""
    prompts_per_step: RowCount = 128
    """Prompts in one PPO step."""
    samples_per_prompt: RowCount = 1
    """Responses to each prompt."""
    max_prompt_tokens: PositiveInt | None = None
    """Budget of a prompt; by default what `rollout.engine.max_model_len` leaves beside the longest response."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to a prompt over the budget; `truncate` keeps its end. Both are counted and reported."""
    shuffle: bool = True
    """New order in each epoch, from the run's seed."""


class ComparisonData(RowData):
    """Texts of which people liked some better than others."""

    OWN_COLUMNS: ClassVar[tuple[str, ...]] = (
        "uid",
        "prompt",
        "chosen",
        "rejected",
        "tie",
        "completions",
        "ranks",
        "best",
        "margin",
        "chosen_rating",
        "rejected_rating",
        "weight",
    )

    train: UsablePath
    """Source of rows with `chosen` and `rejected`, or `completions` and their `ranks`, and optionally `prompt`: a
    JSONL, JSON, CSV or Parquet file, a folder of `datasets.save_to_disk`, or a name on the hub."""
    train_rows: PositiveInt | None = None
    """Rows of `train` that are used, from its beginning; by default all."""
    eval: UsablePath | None = None
    """Source of held-out rows."""
    eval_rows: PositiveInt | None = None
    """Rows of `eval` that are used, from its beginning; by default all."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our columns that the sources name otherwise: `{chosen: better, rejected: worse}`."""
    rows_per_step: RowCount = 32
    """Rows in one optimizer step."""
    max_tokens: PositiveInt = 1024
    """Budget of one text with its prompt."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to a row with a text over the budget; `truncate` keeps the end of each. Both are reported."""
    repeated_prompt: RepeatedPrompt = "refuse"
    """What happens to a row of plain text whose answers all begin with the whole prompt: `refuse` is an error, `strip`
    takes the prompt out of them, `keep` has it there twice. Of conversations it is always taken once."""


class PreferenceData(ComparisonData):
    """Answers that people preferred to others, or judged one by one."""

    OWN_COLUMNS = (
        "uid",
        "prompt",
        "chosen",
        "rejected",
        "completion",
        "label",
        "margin",
        "chosen_rating",
        "rejected_rating",
        "weight",
    )

    train: UsablePath
    """Source of rows with `chosen` and `rejected` and mostly `prompt`, or `prompt`, `completion` and `label`: a JSONL,
    JSON, CSV or Parquet file, a folder of `datasets.save_to_disk`, or a name on the hub."""
    max_tokens: PositiveInt = 1024
    """Budget of one answer with its prompt."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to a row over the budget; `truncate` keeps the beginning of each answer. Both are reported."""


class ConversationSource(Section):
    """One of several sources of rows."""

    path: UsablePath
    """Source, as `data.train`."""
    weight: PositiveFloat = 1.0
    """How often an epoch has each row: 2 has all twice, 0.5 the first half of the source once. With `data.streaming`
    the share of rows that are taken from this source."""


class ConversationData(RowData):
    """Texts and conversations to learn to write."""

    OWN_COLUMNS = ("uid", "text", "messages", "prompt", "completion")

    train: UsablePath | tuple[ConversationSource, ...]
    """Source of rows with `text`, or `messages` (a list of chat messages), or `prompt` and `completion` (both text or
    both lists of chat messages): a JSONL, JSON, CSV or Parquet file, a folder of `datasets.save_to_disk`, or a name on
    the hub; or several sources with weights."""
    train_rows: PositiveInt | None = None
    """Rows of each source of `train` that are used, from its beginning; by default all."""
    eval: UsablePath | None = None
    """Source of held-out rows."""
    eval_rows: PositiveInt | None = None
    """Rows of `eval` that are used, from its beginning; by default all."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our columns that the sources name otherwise: `{prompt: question, completion: answer}`."""
    streaming: bool = False
    """Read rows while training instead of before, so that they need not fit into memory. Needs `run.steps`. Rows that
    can't be used are skipped and told of."""
    shuffle_buffer: RowCount = DEFAULT_SHUFFLE_BUFFER
    """With `streaming`: rows that wait, of which the next is drawn at random; 1 keeps the order of the sources."""
    rows_per_step: RowCount = 32
    """Rows in one optimizer step."""
    loss: Literal["assistant", "all"] = "assistant"
    """What is learnt: `assistant` the assistant's turns and completions (and all of `text`), `all` every token."""
    max_tokens: PositiveInt = 1024
    """Budget of one row."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to a row over the budget; `truncate` keeps its beginning. Both are counted and reported."""
    repeated_prompt: RepeatedPrompt = "refuse"
    """What happens to a completion in plain text that begins with the whole prompt: `refuse` is an error, `strip` takes
    the prompt out of it, `keep` has it there twice. Of conversations it is always taken once."""

    @property
    def sources(self) -> tuple[ConversationSource, ...]:
        """What to train on."""
        return (ConversationSource(path=self.train),) if isinstance(self.train, str) else self.train

    @model_validator(mode="after")
    def _keys_agree(self) -> "ConversationData":
        if not self.sources:
            raise ValueError(".train is empty, but needs at least one source")
        if self.shuffle_buffer != DEFAULT_SHUFFLE_BUFFER and not self.streaming:
            raise ValueError(f".shuffle_buffer ({self.shuffle_buffer}) has no effect without .streaming: true")
        if self.train_rows is not None and self.streaming:
            raise ValueError(f".train_rows ({self.train_rows}) has no effect with .streaming: run.steps is the limit")
        return self
