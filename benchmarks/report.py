"""Writes the results into docs/benchmarks.md: `python -m benchmarks.report`."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import RESULTS, ROOT, Result, ResultsOption, run_command

PAGE = ROOT / "docs" / "benchmarks.md"
# Order of the page.
BENCHMARKS = (
    "rollout",
    "update",
    "epochs",
    "dpo_trl",
    "attention",
    "bfloat16_products",
    "dpo_memory",
    "zero3_loading",
    "sequence_parallel",
    "weight_sync",
    "lora",
    "plan_accuracy",
    "overhead",
    "scale",
    "watching",
    "logprob_gap",
    "determinism",
    "grpo_step",
    "reward_labels",
)
_BEGIN = "<!-- results: written by `python -m benchmarks.report` -->"
_END = "<!-- end of results -->"


def main(
    results: ResultsOption = RESULTS,
    page: Annotated[Path, typer.Option(metavar="MARKDOWN", help="Page to write into.", exists=True)] = PAGE,
) -> None:
    """Write the newest result of each benchmark and subject into the page, between its two markers."""
    text = page.read_text(encoding="utf-8")
    if text.count(_BEGIN) != 1 or text.count(_END) != 1:
        raise typer.BadParameter(f"{page} needs exactly one line {_BEGIN!r} and one line {_END!r}")
    found = newest(results)
    table = "\n".join(render(found))
    pattern = re.compile(f"{re.escape(_BEGIN)}.*{re.escape(_END)}", re.DOTALL)
    page.write_text(pattern.sub(lambda _: f"{_BEGIN}\n\n{table}\n\n{_END}", text), encoding="utf-8")
    typer.echo(f"{page}: {len(found)} results")


def newest(path: Path) -> list[Result]:
    """The last result of each benchmark and subject, in the page's order; none when there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    by_subject: dict[tuple[str, str], Result] = {}
    for line in lines:
        result = Result.model_validate_json(line)
        by_subject[result.benchmark, result.subject] = result
    return sorted(by_subject.values(), key=lambda result: (BENCHMARKS.index(result.benchmark), result.subject))


def render(results: Sequence[Result]) -> Iterator[str]:
    """Lines of Markdown: the bounded numbers, where they were measured, then all numbers of each benchmark."""
    setups: list[str] = list(dict.fromkeys(_setup(result) for result in results))
    yield "| Result | On | | Asked for |"
    yield "|---|---|---|---|"
    for benchmark in BENCHMARKS:
        of_this = [result for result in results if result.benchmark == benchmark]
        if not of_this:
            yield f"| {benchmark} | | not measured yet | |"
        for result in of_this:
            for measure in [m for m in result.measures if m.asked] or result.measures[:1]:
                yield f"| {measure.name} | {result.subject} | **{measure.shown}** | {measure.asked} |"
    for number, setup in enumerate(setups, start=1):
        yield f"\nMachine {number}: {setup}."
    for result in results:
        yield f"\n### {result.benchmark}: {result.subject}\n"
        yield "| | |"
        yield "|---|---|"
        for measure in result.measures:
            yield f"| {measure.name} | {measure.shown} |"
        facts = [f"Machine {setups.index(_setup(result)) + 1}", result.date_utc]
        if result.commit:
            facts.append(f"commit {result.commit}")
        facts.append(f"load at the start {result.machine.load:g}")
        yield f"\n{', '.join(facts)}.{_arguments(result)}"


def _setup(result: Result) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return f"{result.machine.hardware}; {libraries}"


def _arguments(result: Result) -> str:
    shown = []
    for name, value in result.arguments.items():
        if isinstance(value, list):
            value = " ".join(map(str, value))
        if value is not None and name not in ("model", "config"):
            shown.append(f"{name.replace('_', ' ')} {value}")
    return f" With {', '.join(shown)}." if shown else ""


if __name__ == "__main__":
    run_command(main)
