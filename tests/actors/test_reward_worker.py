"""Reward workers: a model gives scores as they are or in the scale that its folder names, a function gets columns."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config

from rlhf_ray.actors.reward import RewardModelWorker, TextRewardWorker
from rlhf_ray.config.rewards import FunctionReward, ModelReward
from rlhf_ray.data.prompt_rows import PromptRows
from rlhf_ray.data.trajectory import TrajectoryBatch
from rlhf_ray.models.score_scale import ScoreScale, write_scale
from rlhf_ray.rewards.errors import RewardError
from rlhf_ray.telemetry.trace import SpanRecorder


@pytest.fixture
def scores_of(tiny_model_dir: Path, make_batch: Callable[..., TrajectoryBatch]) -> Callable[..., np.ndarray]:
    def score(model: Path, **settings: object) -> np.ndarray:
        worker = RewardModelWorker.__new__(RewardModelWorker)  # its `__init__` is an actor's
        worker.rank, worker.world_size, worker.recorder = 0, 1, SpanRecorder()
        part = ModelReward(model=str(model), engine={"dtype": "float32"}, **settings)
        worker.load_model(part, "r", str(tiny_model_dir), False, True)
        found = worker.score(make_batch([3, 5, 2], [4, 1, 7]))
        return found.scores[np.argsort(found.samples)]

    return score


def test_scores_are_normalised_where_the_config_says_so(
    tiny_model_dir: Path, as_reward_model: Callable[[Path], Path], tmp_path: Path, scores_of: Callable[..., np.ndarray]
) -> None:
    model = shutil.copytree(as_reward_model(tiny_model_dir), tmp_path / "model")
    raw = scores_of(model)
    write_scale(model, ScoreScale(0.25, 4.0))
    assert scores_of(model) == pytest.approx(raw)
    assert scores_of(model, normalise=True) == pytest.approx((raw - 0.25) / 4, rel=1e-5)


def test_a_function_gets_the_columns_of_each_samples_row(
    tiny_model_dir: Path, make_batch: Callable[..., TrajectoryBatch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "column_rewards.py").write_text("def given(responses, answer, group=None):\n    return answer\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows = PromptRows.of([b'{"answer":7}', b'{"answer":8,"group":"x"}', b'{"answer":7}'])
    batch = replace(make_batch([3, 5, 2], [4, 1, 7]), rows=rows)
    worker = TextRewardWorker.__new__(TextRewardWorker)  # its `__init__` is an actor's
    worker.recorder = SpanRecorder()
    worker.load_model(FunctionReward(function="column_rewards:given"), str(tiny_model_dir), False, ["answer", "group"])
    assert worker.score(batch).scores.tolist() == [7, 8, 7]
    assert worker.score(batch.select([1, 0])).scores.tolist() == [8, 7]


def test_a_sample_that_has_too_many_tokens_of_another_vocabulary_is_named(
    tiny_model_dir: Path, make_batch: Callable[..., TrajectoryBatch], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=9, num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    worker = RewardModelWorker.__new__(RewardModelWorker)
    worker.rank, worker.world_size, worker.recorder = 0, 1, SpanRecorder()
    part = ModelReward(model=str(tmp_path), engine={"dtype": "float32"})
    worker.load_model(part, "r", str(tiny_model_dir), False, False)
    assert len(worker.score(make_batch([2], [3])).scores) == 1
    with pytest.raises(RewardError, match=r"has positions for 9 tokens, but samples have up to \d+ of its") as caught:
        worker.score(make_batch([2, 20], [3, 30]))
    assert caught.value.samples == ("p1",)
