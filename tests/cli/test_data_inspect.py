"""`rlhf-ray data inspect` shows what is in the data of a job, good rows beside bad ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import Result

from rlhf_ray.cli.inspection import as_text, inspect_sources
from rlhf_ray.config.loading import parse_config

RunCli = Callable[..., Result]

USER = {"role": "user", "content": "Is it good?"}
TALK = [USER, {"role": "assistant", "content": "Yes."}]


@pytest.fixture
def job(prepared: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the config of a job and its rows; gives the config's path."""

    def make(kind: str, rows: list[Any], name: str = "rows.jsonl", **sections: Any) -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        model = {"model": str(prepared / "models/tiny")}
        raw = {"job": kind, "name": "x", "run": {"dir": str(tmp_path / "run")}, "data": {"train": str(path)}}
        if kind == "ppo":
            raw |= {
                "policy": model,
                "reward": [{"function": "a:b"}],
                "critic": {"init_from": "none"},
                "data": {"prompts": str(path), "prompts_per_step": 1},
                "run": {"dir": "run", "steps": 1},
            }
        else:
            raw |= {"reward" if kind == "reward_model" else "policy": model}
        raw["data"] |= sections.pop("data", {})
        config = tmp_path / "job.json"  # which is YAML too
        config.write_text(json.dumps(raw | sections))
        return config

    return make


def test_conversations_are_counted_measured_and_shown(cli: RunCli, job: Callable[..., Path], prepared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepared / "models/tiny")
    rows = [
        {"messages": TALK, "uid": "talk"},
        {"prompt": "It is", "completion": " a film."},
        {"text": "word " * 50},
        {"text": "A\x1b[31m film."},
        {"text": "The fourth."},
    ]
    done = cli("data", "inspect", job("sft", rows), "data.max_tokens=40")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("data.train: ")
    assert lines[1] == "rows: 5 read, 4 kept, 1 dropped, 0 truncated, 0 refused"
    whole = [len(tokenizer.apply_chat_template(TALK)["input_ids"])] + [
        len(tokenizer(text)["input_ids"]) + 1 for text in ("It is a film.", "A\x1b[31m film.", "The fourth.")
    ]
    cells = next(line for line in lines if line.startswith("tokens of a row")).split()[4:]
    assert [int(cells[0]), int(cells[-1])] == [min(whole), max(whole)]
    assert [line.split()[-1] for line in lines if line.startswith("tokens before the budget")] == [
        str(len(tokenizer(rows[2]["text"])["input_ids"]) + 1)
    ]
    shown = done.stdout[done.stdout.index("example 1") :]
    assert shown == (
        "example 1: talk (⟦…⟧ counts in the loss)\n"
        "<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>\n⟧\n"
        "example 2: rows:2\nIt is⟦ a film.<|im_end|>⟧\n"
        "example 3: rows:4\nA⟦␛[31m film.<|im_end|>⟧\n"
    )


def test_all_problems_are_listed_and_good_rows_shown(cli: RunCli, job: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"text": ""}, {"text": "A film."}, "{", {"prompt": "It is a fi", "completion": "lm."}]
    done = cli("data", "inspect", job("sft", rows))
    assert done.exit_code == 2
    path = tmp_path / "rows.jsonl"
    assert "rows: 4 read, 1 kept, 0 dropped, 0 truncated, 3 refused\n" in done.stdout
    assert f"problems:\n  {path}:1: 'text' is empty\n  {path}:3: is not JSON" in done.stdout
    assert f"\n  {path}:4: the tokens of its prompt are not the first tokens" in done.stdout
    assert "example 1: rows:2 (⟦…⟧ counts in the loss)\nA⟦ film.<|im_end|>⟧\n" in done.stdout
    assert done.stderr.endswith("error: 3 problems\n")
    assert not (tmp_path / "run").exists()
    assert not ray.is_initialized()


def test_a_source_without_a_good_row_is_told_beside_the_others(
    cli: RunCli, job: Callable[..., Path], tmp_path: Path
) -> None:
    config = job("sft", [{"text": "A film."}])
    for eval_rows, problem in [
        ('{"text": ""}\n', "bad.jsonl:1: 'text' is empty"),
        ('{"text": "A long film."}\n', "bad.jsonl: none of 1 rows fits data.max_tokens (4)"),
        ("", "bad.jsonl: is empty, but must have one JSON object a line: see data.eval"),
    ]:
        (tmp_path / "bad.jsonl").write_text(eval_rows)
        done = cli("data", "inspect", config, f"data.eval={tmp_path}/bad.jsonl", "data.max_tokens=4")
        assert done.exit_code == 2
        assert "\ndata.eval: " in done.stdout
        assert problem in done.stdout
        assert "example 1: rows:1" in done.stdout


@pytest.mark.parametrize(
    ("kind", "sections", "row", "shown"),
    [
        (
            "preference",
            {},
            {"prompt": "Is it?", "chosen": " Yes.", "rejected": " No."},
            "example 1: rows:1 (⟦…⟧ counts in the loss)\n"
            "rank 0:\nIs it?⟦ Yes.<|im_end|>⟧\nrank 1:\nIs it?⟦ No.<|im_end|>⟧\n",
        ),
        (
            "preference",
            {"algorithm": {"loss": [{"type": "kto"}]}},
            {"prompt": [USER], "completion": TALK[1:], "label": False},
            "unwanted:\n<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>\n⟧\n",
        ),
        (
            "reward_model",
            {"loss": {"type": "softmax"}},
            {"completions": ["A.", "B.", "C."], "best": 1},
            "example 1: rows:1 (⟦…⟧ is where the score is read)\nrank 1:\nA⟦.⟧\nrank 0:\nB⟦.⟧\nrank 1:\nC⟦.⟧\n",
        ),
        ("ppo", {}, {"prompt": "Is it"}, "example 1: rows:1 (the policy goes on from the end of each)\nIs it\n"),
    ],
)
def test_every_job_shows_its_rows(
    kind: str, sections: dict[str, Any], row: dict[str, Any], shown: str, cli: RunCli, job: Callable[..., Path]
) -> None:
    done = cli("data", "inspect", job(kind, [row], **sections))
    assert done.exit_code == 0, done.output
    assert shown in done.stdout
    assert "1 read, 1 kept" in done.stdout


def test_too_few_prompts_are_a_problem_beside_the_prompts(cli: RunCli, job: Callable[..., Path]) -> None:
    done = cli("data", "inspect", job("ppo", [{"prompt": "Is it"}, {"prompt": ""}]), "data.prompts_per_step=3")
    assert done.exit_code == 2
    assert "rows.jsonl:2: 'prompt' is empty" in done.stdout
    assert "data.prompts_per_step is 3" in done.stdout
    assert "example 1: rows:1" in done.stdout


def test_rows_that_the_loss_cannot_learn_from_are_problems(cli: RunCli, job: Callable[..., Path]) -> None:
    done = cli("data", "inspect", job("reward_model", [{"completions": ["A.", "B.", "C."], "best": 1}]))
    assert done.exit_code == 2
    assert "have more than two candidates, but loss.type is 'bradley_terry'" in done.stdout


def test_each_of_several_sources_is_shown_with_its_share(cli: RunCli, job: Callable[..., Path], tmp_path: Path) -> None:
    config = job("sft", [{"text": "One."}, {"text": "Two, which is longer."}])
    source = f"{tmp_path}/rows.jsonl"
    sources = f"data.train=[{{path: {source}}}, {{path: {source}, weight: 0.5}}]"
    done = cli("data", "inspect", config, sources, "data.train_rows=1")
    assert done.exit_code == 0, done.output
    assert f"data.train.0.path: {source}, its first 1 rows\n" in done.stdout
    assert f"\ndata.train.1.path: {source}, its first 1 rows, weight 0.5\n" in done.stdout
    assert "Two" not in done.stdout


def test_a_model_without_a_tokenizer_is_bad_input(cli: RunCli, job: Callable[..., Path]) -> None:
    config = job("sft", [{"text": "A film."}])
    done = cli("data", "inspect", config, "policy.model=nowhere")
    assert done.exit_code == 2
    assert f"error: {config}: policy.model: model 'nowhere'" in done.stderr


def test_a_stream_is_inspected_as_a_whole_and_validated(cli: RunCli, job: Callable[..., Path], tmp_path: Path) -> None:
    config = job("sft", [{"text": "A film."}, {"text": ""}], data={"streaming": True})
    done = cli("data", "inspect", config, "run.steps=5")
    assert (done.exit_code, "rows: 2 read, 1 kept" in done.stdout) == (2, True)
    done = cli("validate", config, "run.steps=5")
    assert done.exit_code == 0, done.output
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert ["steps", "5, 32 rows a step"] in lines
    assert ["rows", "read while training"] in lines


def test_learnt_text_is_green_on_a_terminal(job: Callable[..., Path]) -> None:
    raw = json.loads(job("sft", [{"prompt": "It is", "completion": " a film."}]).read_text())
    [report] = inspect_sources(parse_config(raw))
    [[example]] = report.examples.values()
    text = as_text(example, report.tokenizer)
    assert text.plain == "It is⟦ a film.<|im_end|>⟧"
    assert [(text.plain[span.start : span.end], span.style) for span in text.spans if span.style] == [
        ("⟦ a film.<|im_end|>⟧", "green")
    ]
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as captured:
        console.print(text)
    assert "\x1b[32m⟦ a film.<|im_end|>⟧\x1b[0m" in captured.get()
    assert np.flatnonzero(example.learnt).tolist() == list(range(2, len(example.tokens)))


def test_columns_that_travel_with_the_samples_are_named(cli: RunCli, job: Callable[..., Path]) -> None:
    rows = [{"prompt": "2 + 3 =", "answer": "5", "level": 1}, {"prompt": "2 + 4 =", "answer": "6"}]
    done = cli("data", "inspect", job("ppo", rows))
    assert "columns that travel with the samples: answer, level (1 rows)" in done.stdout.splitlines()
