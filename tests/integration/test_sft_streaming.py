"""configs/tiny_sft.yaml over a stream: which rows are learnt, what is skipped, and going on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlhf_ray.config.data import ConversationData
from rlhf_ray.config.jobs import SFTJob
from rlhf_ray.controllers.train import train
from rlhf_ray.data.conversations import load_conversations
from rlhf_ray.telemetry.metrics import read_metrics
from rlhf_ray.telemetry.names import find_metric
from rlhf_ray.telemetry.rows import read_rows
from runs import assert_same_run, transformers_loss

STEPS, PER_STEP = 5, 16

MakeConfig = Callable[..., SFTJob]


@pytest.fixture(scope="module")
def lines(tiny: Path) -> list[str]:
    """Rows to train on: 48 good ones, and broken ones at lines 20 and 30."""
    good = (tiny / "data/tiny_chats_train.jsonl").read_text().splitlines()
    assert len(good) == 48
    return [*good[:19], "{", *good[19:28], json.dumps({"text": "long " * 300}), *good[28:]]


@pytest.fixture(scope="module")
def source(tiny: Path, lines: list[str]) -> Path:
    path = tiny / "streamed.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def streamed(source: Path, *overrides: str) -> list[str]:
    """Overrides that make a run of a config read this source while it trains."""
    settings = ("data.streaming=true", f"data.train={source}", "run.epochs=1", f"run.steps={STEPS}")
    return [*settings, *overrides]


def test_each_step_learns_the_next_rows_of_the_file(
    tiny: Path, source: Path, lines: list[str], sft_config: MakeConfig, tmp_path: Path
) -> None:
    """The learning rate changes no bit of the model, so the loss of a step tells which rows it has."""
    still = ("data.shuffle_buffer=1", "policy.optimizer.lr=1e-30")
    folder = train(sft_config(tmp_path / "run", *streamed(source, *still)))
    model = tiny / "models/tiny"
    good = [line for line in lines if line != "{" and len(line) < 1000]
    for row in read_metrics(folder):
        start = (int(row["step"]) - 1) * PER_STEP % len(good)
        part = tmp_path / "part.jsonl"
        part.write_text("\n".join(good[start : start + PER_STEP]) + "\n")
        rows = load_conversations(ConversationData(train=str(part)), part, AutoTokenizer.from_pretrained(model))
        assert row["train/loss"] == pytest.approx(transformers_loss(model, rows), abs=1e-5)
        assert "epoch" not in row
        assert not {name for name in row if find_metric(name) is None}
    # Lines 20 and 30 lie among the second sixteen rows of each pass.
    assert [row["data/dropped"] for row in read_metrics(folder)] == [0, 2, 0, 0, 2]


@pytest.fixture(scope="module")
def streamed_run(tiny: Path, source: Path, sft_config: MakeConfig) -> Path:
    overrides = streamed(source, "data.shuffle_buffer=20", "run.checkpoint_every=1", "run.keep_last=9")
    return train(sft_config(tiny / "runs/streamed", *overrides))


def test_rows_that_are_skipped_are_written_down_once(streamed_run: Path, source: Path) -> None:
    dropped = read_rows(streamed_run / "dropped_rows.jsonl")
    assert [(row["step"], row["source"], row["row"]) for row in dropped] == [(1, str(source), 20), (1, str(source), 30)]
    assert dropped[0]["reason"].startswith("is not JSON")
    assert dropped[1]["reason"].endswith("but data.max_tokens is 128")
    counted = [row["data/dropped"] for row in read_metrics(streamed_run)]
    assert counted[0] == 2
    assert sum(counted) == 4  # 5 steps of 16 and the buffer are two passes
    assert read_metrics(streamed_run)[-1]["train/loss"] < read_metrics(streamed_run)[0]["train/loss"] - 0.5


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_stream_gives_the_same_rows(
    step: int, streamed_run: Path, source: Path, sft_config: MakeConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(streamed_run, folder)
    shutil.rmtree(folder / "export")
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(folder / f"checkpoints/step_{later:06d}")
    overrides = streamed(source, "data.shuffle_buffer=20", "run.checkpoint_every=1", "run.keep_last=9")
    train(sft_config(folder, *overrides))
    assert_same_run(folder, streamed_run)
    assert read_rows(folder / "dropped_rows.jsonl") == read_rows(streamed_run / "dropped_rows.jsonl")
