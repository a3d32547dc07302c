"""What a job learns from its data, for people to read."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rlhf_ray.cli.results import note, show
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import ConfigError
from rlhf_ray.controllers.inspection import Example, SourceReport
from rlhf_ray.controllers.job import definition_of
from rlhf_ray.data.errors import DataError, DataErrors, by_kind
from rlhf_ray.models.heads import ModelError, load_tokenizer
from rlhf_ray.telemetry.progress import QuietConsole

_QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
# Control characters as pictures of them: a text must not move the cursor of who reads it.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}


def inspect_sources(config: Job) -> Iterator[SourceReport]:
    """A report on each source of a job, in the order of its config.

    Raises:
        ConfigError: the model has no tokenizer.
    """
    definition, model = definition_of(config), config.roles[0].model
    if model is None:
        raise ConfigError("inspect", [f"job: {config.job} has no model whose tokenizer could read its data"])
    try:
        tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    except ModelError as error:
        raise ConfigError("inspect", [f"{model.key}: {error}"]) from error
    for source in definition.sources(config):
        used = "" if source.limit is None else f", its first {source.limit} rows"
        weighed = "" if source.weight == 1 else f", weight {source.weight:g}"
        report = SourceReport(f"{source.key}: {source.name}{used}{weighed}", definition.mark, tokenizer)
        try:
            definition.load_source(config, source, report)
        except DataErrors as error:
            report.findings.problems = list(error.errors)
        except DataError as error:
            report.findings.problems.append(error)
        found = sorted(report.findings.problems, key=lambda problem: problem.row or 0)
        report.count = len(found) + len(report.problems)
        report.problems = [*by_kind(found), *report.problems]
        yield report


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
