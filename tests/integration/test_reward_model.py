"""configs/tiny_reward.yaml end to end, resumed, and on two ranks."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.config.jobs import RewardModelJob
from rlhf_ray.controllers.train import train
from rlhf_ray.models.heads import load_scalar
from rlhf_ray.telemetry.metrics import read_metrics
from rlhf_ray.telemetry.names import find_metric
from runs import assert_same_run, exported_weights

STEPS = 8

MakeConfig = Callable[..., RewardModelJob]


def test_the_reward_model_learns_its_pairs(reward_run: Path) -> None:
    rows = read_metrics(reward_run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["train/accuracy"] > 0.9
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert {"eval/accuracy", "eval/loss", "eval/margin"} <= rows[-1].keys()
    assert not {name for row in rows for name in row if find_metric(name) is None}


def test_the_export_loads_with_transformers_and_equals_the_checkpoint(reward_run: Path) -> None:
    theirs = AutoModelForSequenceClassification.from_pretrained(reward_run / "export", dtype=torch.float32)
    assert theirs.config.num_labels == 1
    checkpoint = torch.load(
        reward_run / f"checkpoints/step_{STEPS:06d}/reward/state/mp_rank_00_model_states.pt", weights_only=False
    )["module"]
    trained = {name.removeprefix("model."): tensor for name, tensor in checkpoint.items()}
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    ours = load_scalar(str(reward_run / "export"), dtype=torch.float32)
    assert torch.equal(theirs.score.weight, ours.model.score.weight)
    text = AutoTokenizer.from_pretrained(reward_run / "export")(["A warm and funny film."], return_tensors="pt")
    assert theirs(**text).logits.shape == (1, 1)


def test_a_resumed_run_gives_the_same_rows(reward_run: Path, reward_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reward_run, folder)
    shutil.rmtree(folder / "export")
    for step in (6, STEPS):
        shutil.rmtree(folder / f"checkpoints/step_{step:06d}")
    train(reward_config(folder, "run.checkpoint_every=3", "run.keep_last=9"))
    assert_same_run(folder, reward_run)


def test_two_sharded_ranks_learn_what_one_learns(reward_run: Path, reward_config: MakeConfig, tmp_path: Path) -> None:
    overrides = ("placement.reward.ranks=2", "reward.engine.zero_stage=3", "reward.engine.micro_batch_tokens=100")
    folder = train(reward_config(tmp_path / "run", *overrides))
    for mine, theirs in zip(read_metrics(folder), read_metrics(reward_run), strict=True):
        for name in ("train/loss", "train/margin", "train/grad_norm", "train/lr"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), f"step {mine['step']}: {name}"
    whole = exported_weights(reward_run / "export")
    for name, tensor in exported_weights(folder / "export").items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-3)
