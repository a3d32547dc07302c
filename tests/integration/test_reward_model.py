"""configs/tiny_reward.yaml end to end, resumed, and on two ranks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.config.jobs import RewardModelJob
from rlhf_ray.config.loading import load_config
from rlhf_ray.controllers.train import train
from rlhf_ray.models.heads import load_scalar
from rlhf_ray.models.score_scale import ScoreScale, scale_of
from rlhf_ray.telemetry.metrics import read_metrics
from rlhf_ray.telemetry.names import find_metric
from rlhf_ray.telemetry.reward_report import read_report
from runs import assert_same_run, exported_weights

STEPS = 8

MakeConfig = Callable[..., RewardModelJob]


def test_the_reward_model_learns_its_pairs(reward_run: Path) -> None:
    rows = read_metrics(reward_run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["train/accuracy"] > 0.9
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert {"eval/accuracy", "eval/loss", "eval/margin", "score/mean", "score/std"} <= rows[-1].keys()
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


def test_the_report_and_the_scale_of_the_export_are_of_the_last_evaluation(reward_run: Path) -> None:
    last = read_metrics(reward_run)[-1]
    report = read_report(reward_run)
    assert (report["step"], report["rows"]["held_out"], report["rows"]["rows"]) == (STEPS, True, 32)
    assert report["accuracy"]["value"] == pytest.approx(last["eval/accuracy"])
    assert report["scores"]["all"]["mean"] == pytest.approx(last["score/mean"])
    assert (reward_run / "reliability.png").is_file()
    assert scale_of(str(reward_run / "export")) == ScoreScale(last["score/mean"], last["score/std"])
    # The scores are those that transformers gives, by the exported model.
    model = AutoModelForSequenceClassification.from_pretrained(reward_run / "export", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(reward_run / "export")
    config = load_config(reward_run / "config.yaml")
    assert isinstance(config, RewardModelJob)
    pairs = [json.loads(line) for line in Path(str(config.data.eval)).read_text().splitlines()]
    texts = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    scores = [float(model(**tokenizer([text], return_tensors="pt")).logits.detach()) for text in texts]
    assert np.mean(scores) == pytest.approx(last["score/mean"], rel=1e-4, abs=1e-5)
    assert np.std(scores) == pytest.approx(last["score/std"], rel=1e-4)
    assert np.mean(np.array(scores[0::2]) > scores[1::2]) == last["eval/accuracy"]


def test_without_held_out_rows_the_scale_is_of_training_texts(reward_config: MakeConfig, tmp_path: Path) -> None:
    folder = train(reward_config(tmp_path / "run", "data.eval=null", "run.epochs=1", "run.eval_every=1"))
    first, *_, last = read_metrics(folder)
    assert "score/mean" not in first
    assert not any(name.startswith("eval/") for name in last)
    assert scale_of(str(folder / "export")) == ScoreScale(last["score/mean"], last["score/std"])
    assert read_report(folder)["rows"]["held_out"] is False


def test_the_best_model_is_the_one_that_is_reported_on(reward_config: MakeConfig, tmp_path: Path) -> None:
    """A learning rate that soon makes everything worse, so that the best evaluation is not the last."""
    keep = "run.keep_best={metric: eval/loss, mode: min}"
    folder = train(
        reward_config(tmp_path / "run", "reward.optimizer.lr=3e-2", keep, "run.patience=2", "run.eval_every=1")
    )
    evaluated = {row["step"]: row for row in read_metrics(folder)}
    best = min(evaluated.values(), key=lambda row: row["eval/loss"])
    report = read_report(folder)
    assert report["step"] == best["step"] < max(evaluated)
    assert report["accuracy"]["value"] == pytest.approx(best["eval/accuracy"])
    assert scale_of(str(folder / "export")) == ScoreScale(best["score/mean"], best["score/std"])


def test_rankings_are_learnt_and_judged_by_pairs(tiny: Path, reward_config: MakeConfig, tmp_path: Path) -> None:
    rankings = f"data.train={tiny}/data/tiny_rankings_train.jsonl"
    folder = train(reward_config(tmp_path / "run", "loss={type: plackett_luce}", rankings, "run.epochs=4"))
    rows = read_metrics(folder)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert rows[-1]["train/accuracy"] > 0.9
    report = read_report(folder)
    assert (report["rows"]["rows"], report["rows"]["candidates"], report["rows"]["pairs"]) == (32, 64, 32)


def test_a_resumed_run_gives_the_same_rows(reward_run: Path, reward_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reward_run, folder)
    shutil.rmtree(folder / "export")
    for step in (6, STEPS):
        shutil.rmtree(folder / f"checkpoints/step_{step:06d}")
    train(reward_config(folder, "run.checkpoint_every=3", "run.keep_last=9"))
    assert_same_run(folder, reward_run)
    assert read_report(folder) == read_report(reward_run)
    assert scale_of(str(folder / "export")) == scale_of(str(reward_run / "export"))


@pytest.mark.parametrize("sharing", [1, 2], ids=["own sequences", "shared sequences"])
def test_two_sharded_ranks_learn_what_one_learns(
    reward_run: Path, reward_config: MakeConfig, tmp_path: Path, sharing: int
) -> None:
    overrides = (
        "placement.reward.ranks=2",
        "reward.engine.zero_stage=3",
        "reward.engine.micro_batch_tokens=100",
        f"reward.engine.sequence_parallel={sharing}",
    )
    folder = train(reward_config(tmp_path / "run", *overrides))
    for mine, theirs in zip(read_metrics(folder), read_metrics(reward_run), strict=True):
        for name in ("train/loss", "train/margin", "train/grad_norm", "train/lr"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), f"step {mine['step']}: {name}"
    whole = exported_weights(reward_run / "export")
    for name, tensor in exported_weights(folder / "export").items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-3)
