"""What a job learns from its data, for people to read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rlhf_ray.cli.results import note, show
from rlhf_ray.config.jobs import JobConfig, PPOJob, RewardModelJob, SFTJob
from rlhf_ray.config.loading import ConfigError
from rlhf_ray.controllers.inputs import unfit_rows
from rlhf_ray.data.comparisons import ComparisonSet, load_comparisons
from rlhf_ray.data.conversations import ConversationSet, load_conversations
from rlhf_ray.data.errors import DataError, DataErrors, Findings
from rlhf_ray.data.prompt_rows import RowColumn
from rlhf_ray.data.prompts import PromptSet, load_prompts
from rlhf_ray.data.trajectory import Tokens
from rlhf_ray.models.heads import ModelError, load_tokenizer
from rlhf_ray.telemetry.progress import QuietConsole

EXAMPLES = 3
_QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
# Control characters as pictures of them: a text must not move the cursor of who reads it.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}


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
        problems: one line each.
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


def inspect_sources(config: JobConfig) -> Iterator[SourceReport]:
    """A report on each source of a job, in the order of its config.

    Raises:
        ConfigError: the model has no tokenizer.
    """
    name, model = ("policy", config.policy) if isinstance(config, PPOJob) else (config.role.name, config.role.trained)
    try:
        tokenizer = load_tokenizer(model.model, trust_remote_code=model.trust_remote_code)
    except ModelError as error:
        raise ConfigError("inspect", [f"{name}.model: {error}"]) from error
    for setting, source, limit, weight in _sources(config):
        used = "" if limit is None else f", its first {limit} rows"
        weighed = "" if weight == 1 else f", weight {weight:g}"
        report = SourceReport(f"{setting}: {source}{used}{weighed}", _mark(config), tokenizer)
        try:
            _load(config, setting, source, limit, report)
        except DataErrors as error:
            report.findings.problems = list(error.errors)
        except DataError as error:
            report.findings.problems.append(error)
        found = sorted(report.findings.problems, key=lambda problem: problem.row or 0)
        report.problems = [*map(str, found), *report.problems]
        yield report


def _sources(config: JobConfig) -> Iterator[tuple[str, str, int | None, float]]:
    """Key, name, number of rows that are used (None: all) and weight of each source."""
    if isinstance(config, PPOJob):
        yield "data.prompts", config.data.prompts, None, 1.0
        return
    if isinstance(config.data.train, str):
        yield "data.train", config.data.train, config.data.train_rows, 1.0
    else:
        for index, source in enumerate(config.data.train):
            yield f"data.train.{index}.path", source.path, config.data.train_rows, source.weight
    if config.data.eval is not None:
        yield "data.eval", config.data.eval, config.data.eval_rows, 1.0


def _mark(config: JobConfig) -> str:
    if isinstance(config, PPOJob):
        return "the policy goes on from the end of each"
    return "⟦…⟧ is where the score is read" if isinstance(config, RewardModelJob) else "⟦…⟧ counts in the loss"


def _load(config: JobConfig, setting: str, source: str, limit: int | None, report: SourceReport) -> None:
    tokenizer, found = report.tokenizer, report.findings
    if isinstance(config, PPOJob):
        prompts = load_prompts(config.data, tokenizer, config.max_prompt_tokens, found)
        report.rows, report.lengths = prompts, {"tokens of a prompt": np.diff(prompts.offsets)}
        report.columns = prompts.columns
        for row in range(min(EXAMPLES, len(prompts))):
            tokens = prompts.tokens(row)
            report.examples[prompts.uids[row]] = [Example("", tokens, np.zeros(len(tokens), bool))]
    elif isinstance(config, SFTJob):
        talks = load_conversations(config.data, source, tokenizer, found)
        report.rows, used = talks, talks.first(limit)
        report.lengths = {"tokens of a row": used.lengths, "learnt tokens of a row": used.weights}
        for row in range(min(EXAMPLES, len(used))):
            part = slice(used.offsets[row], used.offsets[row + 1])
            report.examples[used.uids[row]] = [Example("", used.tokens(row), used.learnt[part])]
    else:
        comparisons = load_comparisons(config.data, source, tokenizer, config.kind, found)
        report.rows, judged = comparisons, comparisons.first(limit)
        if isinstance(config, RewardModelJob):
            report.problems += unfit_rows(config, setting, judged)
        report.lengths = _comparison_lengths(judged, whole=config.kind == "rewards")
        for row in range(min(EXAMPLES, len(judged))):
            report.examples[judged.uids[row]] = _candidates(judged, row, whole=config.kind == "rewards")


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


def print_report(report: SourceReport, *, first: bool) -> None:
    """Print it, and before it an empty line unless it is the first."""
    console = QuietConsole()
    if not first:
        note("")
    console.print(Text(report.title, "bold"), soft_wrap=True)
    found, rows = report.findings, report.rows
    kept = "0 kept" if rows is None else f"{len(rows):,} kept, {rows.dropped:,} dropped, {rows.truncated:,} truncated"
    refused = len({problem.row for problem in found.problems if problem.row is not None})
    note(f"rows: {found.read:,} read, {kept}, {refused:,} refused")
    if rows is not None:
        lengths: Mapping[str, Any] = report.lengths
        if rows.dropped or rows.truncated:
            lengths = {"tokens before the budget": found.lengths, **lengths}
        show([("", *_QUANTILES), *((name, *_quantiles(values)) for name, values in lengths.items())])
        if report.columns:
            shown = (c.name if c.rows == len(rows) else f"{c.name} ({c.rows:,} rows)" for c in report.columns)
            note(f"columns that travel with the samples: {', '.join(shown)}")
    if report.problems:
        note("problems:")
        for problem in report.problems:
            note(f"  {problem}")
    for number, (uid, examples) in enumerate(report.examples.items(), start=1):
        mark = f" ({report.mark})" if number == 1 else ""
        console.print(Text(f"example {number}: {uid}{mark}", "bold"), soft_wrap=True)
        for example in examples:
            if example.label:
                console.print(Text(f"{example.label}:", "bold"), soft_wrap=True)
            console.print(as_text(example, report.tokenizer), soft_wrap=True)


def as_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The text of an example, with brackets around what is learnt."""
    text = Text()
    for is_learnt, places in groupby(range(len(example.tokens)), key=lambda place: bool(example.learnt[place])):
        part = tokenizer.decode(example.tokens[list(places)]).translate(_PICTURES)
        text.append(f"⟦{part}⟧" if is_learnt else part, "green" if is_learnt else None)
    return text


def _quantiles(values: NDArray[np.int64]) -> list[str]:
    return [f"{value:,.0f}" for value in np.quantile(values, list(_QUANTILES.values()), method="inverted_cdf")]
