"""A reward model's folder says what its scores are like."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf_ray.models.score_scale import ScoreScale, scale_of, write_scale


@pytest.fixture
def folder(tiny_model_dir: Path, as_reward_model: Callable[[Path], Path], tmp_path: Path) -> Path:
    return shutil.copytree(as_reward_model(tiny_model_dir), tmp_path / "model")


def test_a_scale_survives_transformers(folder: Path, tmp_path: Path) -> None:
    scale = ScoreScale(-1.25, 3.5)
    before = AutoConfig.from_pretrained(folder).to_dict()
    write_scale(folder, scale)
    assert scale_of(str(folder)) == scale
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert (model.config.score_mean, model.config.score_std) == (-1.25, 3.5)
    assert before.items() <= model.config.to_dict().items()
    model.save_pretrained(tmp_path / "again")
    assert scale_of(str(tmp_path / "again")) == scale


def test_the_scale_of_other_weights_is_taken_away(folder: Path) -> None:
    untouched = (folder / "config.json").read_bytes()
    write_scale(folder, None)
    assert (folder / "config.json").read_bytes() == untouched
    write_scale(folder, ScoreScale(1.0, 2.0))
    write_scale(folder, None)
    assert scale_of(str(folder)) is None
    assert json.loads((folder / "config.json").read_bytes()) == json.loads(untouched)


def test_a_scale_comes_from_the_metrics_of_a_step_that_was_evaluated() -> None:
    assert ScoreScale.of_metrics({"score/mean": 0.0, "score/std": 2.0, "train/loss": 1.0}) == ScoreScale(0.0, 2.0)
    assert ScoreScale.of_metrics({"train/loss": 1.0}) is None
    assert ScoreScale.of_metrics({"score/mean": 1.0, "score/std": 0.0}) is None  # can't be divided by


def test_normalised_scores_have_mean_0_and_deviation_1() -> None:
    scores = np.array([1.0, 2.0, 6.0], np.float32)
    found = ScoreScale(float(scores.mean()), float(scores.std())).normalise(scores)
    assert found.dtype == np.float32
    assert (found.mean(), found.std()) == pytest.approx((0, 1), abs=1e-6)
    assert ScoreScale(1.0, 2.0).normalise(scores).tolist() == [0.0, 0.5, 2.5]
