"""What a job learns from a source of rows: counts, lengths and examples, with what is learnt marked."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.data.conversations import ConversationSet
from rlhf_ray.data.errors import Findings
from rlhf_ray.data.prompt_rows import RowColumn
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.data.trajectory import Tokens

EXAMPLES = 3


@dataclass(frozen=True)
class Example:
    """One text as the model gets it: a prompt, a row, or a candidate of a row.

    Attributes:
        label: which candidate it is; empty where there is one text only.
        tokens: int32 `[tokens]`.
        learnt: bool `[tokens]`.
    """

    label: str
    tokens: Tokens
    learnt: NDArray[np.bool_]


@dataclass
class SourceReport:
    """What is in one source of a job.

    Attributes:
        title: dotted path of the key that names it, its name, and how much of it is used.
        mark: what the marked tokens of an example are.
        tokenizer: the model's.
        findings: what loading it showed.
        rows: None where no row can be used.
        lengths: by name, what is measured in tokens.
        examples: by uid, the first rows.
        columns: that travel with the samples of prompts.
        problems: one line each; where there are many, some of each kind and how many more.
        count: of all problems.
    """

    title: str
    mark: str
    tokenizer: PreTrainedTokenizerBase
    findings: Findings = field(default_factory=Findings)
    rows: PromptSet | ComparisonSet | ConversationSet | None = None
    lengths: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    columns: tuple[RowColumn, ...] = ()
    problems: list[str] = field(default_factory=list)
    count: int = 0

    def show_prompts(self, prompts: PromptSet) -> None:
        """What there is to see of prompts."""
        self.rows, self.lengths = prompts, {"tokens of a prompt": np.diff(prompts.offsets)}
        self.columns = prompts.columns
        for row in range(min(EXAMPLES, len(prompts))):
            tokens = prompts.tokens(row)
            self.examples[prompts.uids[row]] = [Example("", tokens, np.zeros(len(tokens), bool))]

    def show_conversations(self, talks: ConversationSet, limit: int | None) -> None:
        """What there is to see of conversations, of which the first `limit` are used."""
        self.rows, used = talks, talks.first(limit)
        self.lengths = {"tokens of a row": used.lengths, "learnt tokens of a row": used.weights}
        for row in range(min(EXAMPLES, len(used))):
            part = slice(used.offsets[row], used.offsets[row + 1])
            self.examples[used.uids[row]] = [Example("", used.tokens(row), used.learnt[part])]

    def show_comparisons(self, comparisons: ComparisonSet, limit: int | None, *, whole: bool) -> ComparisonSet:
        """What there is to see of judged answers; the rows of them that are used.

        Args:
            whole: a score is read at the end of the whole text, rather than all tokens of the answer learnt.
        """
        self.rows, judged = comparisons, comparisons.first(limit)
        self.lengths = _comparison_lengths(judged, whole=whole)
        for row in range(min(EXAMPLES, len(judged))):
            self.examples[judged.uids[row]] = _candidates(judged, row, whole=whole)
        return judged


def _comparison_lengths(rows: ComparisonSet, *, whole: bool) -> dict[str, NDArray[np.int64]]:
    tokens, candidates = np.diff(rows.token_offsets), np.diff(rows.candidate_offsets)
    lengths = {"tokens of a candidate": tokens}
    if not whole:
        lengths["tokens of an answer"] = tokens - rows.answer_starts
    if (candidates > 2).any():
        lengths["candidates of a row"] = candidates
    return lengths


def _candidates(rows: ComparisonSet, row: int, *, whole: bool) -> list[Example]:
    examples = []
    numbers = rows.candidates([row])
    for candidate in numbers:
        tokens, rank = rows.tokens(candidate), rows.ranks[candidate]
        start = len(tokens) - 1 if whole else rows.answer_starts[candidate]
        label = ("wanted", "unwanted")[rank] if len(numbers) == 1 else f"rank {rank}"
        examples.append(Example(label, tokens, np.arange(len(tokens)) >= start))
    return examples
