"""configs/tiny_sft.yaml end to end, against transformers, resumed, and on two ranks."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rlhf_ray.config.jobs import SFTJob
from rlhf_ray.controllers.train import train
from rlhf_ray.data.conversations import load_conversations
from rlhf_ray.recovery.convert import export_checkpoint
from rlhf_ray.telemetry.metrics import read_metrics
from rlhf_ray.telemetry.names import find_metric
from runs import assert_same_run, exported_weights, transformers_loss

STEPS = 6

MakeConfig = Callable[..., SFTJob]


@pytest.fixture(scope="module")
def sft_run(tiny: Path, sft_config: MakeConfig) -> Path:
    """Run folder with a checkpoint within each epoch."""
    return train(sft_config(tiny / "runs/tiny-sft", "run.checkpoint_every=2", "run.keep_last=9"))


def test_the_model_learns_what_it_is_shown(sft_run: Path) -> None:
    rows = read_metrics(sft_run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.5
    assert [row["step"] for row in rows if "eval/loss" in row] == [4, STEPS]
    assert rows[-1]["eval/loss"] < rows[3]["eval/loss"]
    assert not {name for row in rows for name in row if find_metric(name) is None}


def test_losses_are_those_of_transformers(sft_run: Path, tiny: Path, sft_config: MakeConfig) -> None:
    data = sft_config(tiny / "unused").data
    last = read_metrics(sft_run)[-1]
    assert data.eval is not None
    held_out = load_conversations(data, data.eval, AutoTokenizer.from_pretrained(sft_run / "export"))
    assert last["eval/loss"] == pytest.approx(transformers_loss(sft_run / "export", held_out), abs=1e-5)
    assert last["eval/perplexity"] == pytest.approx(math.exp(last["eval/loss"]))


def test_a_checkpoint_can_be_exported(sft_run: Path, tmp_path: Path) -> None:
    exported = export_checkpoint(sft_run, tmp_path / "model")
    assert (exported.role, exported.scalar) == ("policy", False)
    mine, theirs = exported_weights(exported.folder), exported_weights(sft_run / "export")
    assert all(mine[name].equal(tensor) for name, tensor in theirs.items())


def test_a_resumed_run_gives_the_same_rows(sft_run: Path, sft_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(sft_run, folder)
    shutil.rmtree(folder / "export")
    for step in (4, STEPS):
        shutil.rmtree(folder / f"checkpoints/step_{step:06d}")
    train(sft_config(folder, "run.checkpoint_every=2", "run.keep_last=9"))
    assert_same_run(folder, sft_run)


def test_a_run_that_gets_no_better_ends_and_exports_its_best(sft_config: MakeConfig, tmp_path: Path) -> None:
    overrides = (
        "policy.optimizer.lr=0.02",
        "run.epochs=20",
        "run.eval_every=1",
        "run.patience=3",
        "run.keep_last=1",
        "run.keep_best={metric: eval/loss, mode: min}",
    )
    folder = train(sft_config(tmp_path / "run", *overrides))
    rows = read_metrics(folder)
    best = min(rows, key=lambda row: row["eval/loss"])
    assert rows[-1]["step"] == best["step"] + 3 < 60
    assert best["step"] > 1
    exported = export_checkpoint(folder / f"checkpoints/step_{best['step']:06.0f}", tmp_path / "best")
    mine, theirs = exported_weights(folder / "export"), exported_weights(exported.folder)
    assert all(mine[name].equal(tensor) for name, tensor in theirs.items())
    train(sft_config(folder, *overrides))
    assert read_metrics(folder) == rows


@pytest.mark.parametrize("sharing", [1, 2], ids=["own sequences", "shared sequences"])
def test_two_sharded_ranks_learn_what_one_learns(
    sft_run: Path, sft_config: MakeConfig, tmp_path: Path, sharing: int
) -> None:
    overrides = (
        "placement.policy.ranks=2",
        "policy.engine.zero_stage=3",
        "policy.engine.micro_batch_tokens=100",
        f"policy.engine.sequence_parallel={sharing}",
    )
    folder = train(sft_config(tmp_path / "run", *overrides))
    for mine, theirs in zip(read_metrics(folder), read_metrics(sft_run), strict=True):
        for name in ("train/loss", "train/entropy", "train/grad_norm", "train/lr"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), f"step {mine['step']}: {name}"
    whole = exported_weights(sft_run / "export")
    for name, tensor in exported_weights(folder / "export").items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-3)
