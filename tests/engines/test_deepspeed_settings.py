"""What DeepSpeed is told of an engine."""

import pytest
from torch import nn

from rlhf_ray.config.training import ScoringEngine, TrainingEngine
from rlhf_ray.engines.deepspeed_settings import REDUCE_BUCKET, deepspeed_settings, overlaps


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_reduced_in_a_bucket_no_larger_than_they_are(stage: int) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    model[0].requires_grad_(False)
    engine = TrainingEngine.model_validate({"zero_stage": stage, "dtype": "bfloat16"})
    assert deepspeed_settings(engine, model, None)["zero_optimization"]["reduce_bucket_size"] == 5 * 7 + 7


def test_gradients_of_large_models_are_reduced_in_several_buckets() -> None:
    model = nn.Linear(REDUCE_BUCKET, 2, device="meta")
    settings = deepspeed_settings(TrainingEngine(dtype="bfloat16"), model, None)
    assert settings["zero_optimization"]["reduce_bucket_size"] == REDUCE_BUCKET


def test_a_model_that_scores_has_no_gradients() -> None:
    assert (
        "reduce_bucket_size"
        not in deepspeed_settings(ScoringEngine(dtype="bfloat16"), nn.Linear(3, 5), None)["zero_optimization"]
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_reduced_during_the_backward_pass_where_that_is_possible(stage: int) -> None:
    engine = TrainingEngine.model_validate({"zero_stage": stage, "dtype": "bfloat16"})
    assert deepspeed_settings(engine, nn.Linear(3, 5), None)["zero_optimization"]["overlap_comm"] is False
    assert overlaps("cuda", 2)
    assert not overlaps("cuda", 1)
    assert not overlaps("cpu", 2)
