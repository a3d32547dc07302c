"""What every benchmark shares: the command, the result that it appends, and the process of a side."""

import os
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer

from benchmarks.common import Findings, FreshProcess, Measure, Result, in_turns, run_benchmark
from benchmarks.report import newest


def benchmark(
    size: Annotated[int, typer.Option(help="Of it.")] = 3, folder: Annotated[Path, typer.Option()] = Path("models")
) -> Findings:
    """A toy."""
    return {
        "small": [Measure("told", size, "MB"), Measure("judged", 0.5, asked="at least 1")],
        "large": [Measure("told", 10 * size, "MB")],
    }


def test_a_benchmark_is_a_command_that_appends_a_result_for_each_subject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["benchmark", "--results", str(file), "--size", "4"])
    with pytest.raises(SystemExit) as ended:
        run_benchmark(benchmark)
    assert ended.value.code == 0
    small, large = (Result.model_validate_json(line) for line in file.read_text().splitlines())
    assert (small.benchmark, small.subject, large.subject) == ("test_common", "small", "large")
    assert list(small.arguments.items()) == [("size", 4), ("folder", "models")], "in the order of the signature"
    assert [measure.name for measure in small.measures] == ["judged", "told"], "those with a bound come first"
    assert large.measures == (Measure("told", 40.0, "MB"),)
    assert "test_common (small): judged: 0.500 (asked: at least 1)" in capsys.readouterr().out


def test_results_of_the_page_can_be_read() -> None:
    assert newest(Path(__file__).parents[2] / "benchmarks/results.jsonl")


def test_sides_take_turns_and_every_other_round_begins_with_the_last() -> None:
    assert list(in_turns("ab", 3)) == [(1, "a"), (1, "b"), (2, "b"), (2, "a"), (3, "a"), (3, "b")]


def test_a_fresh_process_has_its_environment_and_keeps_what_was_made_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "here")
    with FreshProcess(2, {"KEPT": "there"}) as process:
        assert process.call(os.getenv, "OMP_NUM_THREADS") == "2"
        assert process.call(os.getenv, "KEPT") == "there"
        process.make(list, [3, 1])
        process.ask(list.sort)
        assert process.ask(list.copy) == [1, 3]
    assert os.environ["KEPT"] == "here"
