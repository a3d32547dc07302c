"""When the responses of an engine are complete."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from rlhf_ray.models.shapes import ModelShape
from rlhf_ray.planner.calibration import Calibration, Collectives, Generation, defaults
from rlhf_ray.planner.decoding_time import DecodingEngine, shard_arrivals
from rlhf_ray.planner.pass_time import ProcessGroup, Rates
from rlhf_ray.planner.work import Lengths

SHAPE = ModelShape.of(
    {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 8,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
    "a model",
)
RATES = Rates(1e14, 1e13, 1e12, 1e10, 1e11, 1e9, 1e11, 1e10, ahead=True)
FREE = dict.fromkeys(Generation.model_fields, 0.0)
ONE_A_STEP = Lengths(prompt=100, response=50, longest=50)


def constants(**factors: float) -> Calibration:
    return defaults("gpu").model_copy(update={"generation": Generation(**{**FREE, **factors})})


def engine(slots: int = 64, workers: int = 1, **factors: float) -> DecodingEngine:
    return DecodingEngine(
        SHAPE, "bfloat16", slots, 1, RATES, ProcessGroup(workers, 1, 1e11, 1e10), constants(**factors)
    )


def test_one_sequence_is_bound_by_reading_the_weights() -> None:
    model = engine(weights=1.0, products=1.0)
    norms = 17 * 1024
    assert model.step_s(1, 0) == pytest.approx(2 * SHAPE.parameters / 1e12, rel=norms / SHAPE.parameters)
    assert model.step_s(8, 0) == model.step_s(1, 0)


def test_many_sequences_are_bound_by_their_products() -> None:
    model = engine(weights=1.0, products=1.0)
    assert model.step_s(1000, 0) == pytest.approx(1000 * 2 * SHAPE.parameters / 1e14, rel=1e-3)
    assert model.step_s(2000, 0) == pytest.approx(2 * model.step_s(1000, 0))


def test_a_cpu_reads_and_multiplies_one_after_the_other() -> None:
    gpu = engine(weights=1.0, products=1.0)
    cpu = replace(gpu, rates=replace(RATES, ahead=False))
    assert cpu.step_s(100, 0) == pytest.approx(gpu.step_s(1, 0) + 100 / 1000 * gpu.step_s(1000, 0))


def test_cached_keys_and_values_are_read_for_each_sequence() -> None:
    model = engine(cache=1.0)
    assert model.step_s(10, 500) == pytest.approx(10 * 500 * 2 * 8 * 4 * 64 * 2 / 1e12)


def test_workers_share_the_weights_and_talk_twice_a_layer() -> None:
    one, two = engine(1, 1, weights=1.0), engine(1, 2, weights=1.0)
    silent = Collectives(all_reduce=0, all_gather=0, reduce_scatter=0, call_s=1e-5)
    two = replace(two, constants=two.constants.model_copy(update={"collectives": silent}))
    assert two.step_s(1, 0) == pytest.approx(one.step_s(1, 0) / 2 + 2 * 8 * 1e-5)


def test_a_batch_that_fits_takes_as_many_steps_as_its_longest_response() -> None:
    assert engine(64, step_s=1.0).finish_times(64, ONE_A_STEP) == pytest.approx([50.0] * 32)


def test_more_samples_than_slots_wait_for_their_turn() -> None:
    finished = engine(64, step_s=1.0).finish_times(256, ONE_A_STEP)
    assert finished[-1] == pytest.approx(4 * 50)
    assert [finished[n] for n in (0, 32, 64, 96)] == pytest.approx([50, 100, 150, 200])


def test_slots_are_filled_again_as_soon_as_a_response_ends() -> None:
    lengths = Lengths(prompt=0, response=20, longest=80)
    steps = engine(64, step_s=1.0).finish_times(640, lengths)
    tokens = sum(lengths.responses(len(steps))) * 640 / len(steps)
    # Full but for the drain at the end, in which the longest responses are left.
    assert tokens / 64 <= max(steps) < tokens / 64 + 80


def test_prompts_are_read_when_their_sequences_start() -> None:
    model = engine(64, prompt=1.0)
    layers = SHAPE.parameters - SHAPE.embedding_parameters
    assert model.finish_times(64, ONE_A_STEP)[0] == pytest.approx(2 * layers * 6400 / 1e14, rel=1e-2)
    shared = replace(model, prompts_shared=4)
    assert shared.finish_times(64, ONE_A_STEP)[0] == pytest.approx(model.finish_times(64, ONE_A_STEP)[0] / 4)


@pytest.mark.parametrize("mean", [5.0, 30.0, 60.0, 95.0])
def test_responses_have_the_mean_that_was_asked_for(mean: float) -> None:
    drawn = Lengths(prompt=10, response=mean, longest=100).responses(1000)
    assert sum(drawn) / 1000 == pytest.approx(mean, rel=0.01)
    assert max(drawn) <= 100
    # Any part of them is as mixed as the whole.
    assert sum(drawn[:100]) / 100 == pytest.approx(mean, rel=0.1)


def test_all_responses_are_the_longest_where_that_is_their_mean() -> None:
    assert set(Lengths(prompt=10, response=100, longest=100).responses(50)) == {100}


def test_a_shard_is_complete_with_its_slowest_sample() -> None:
    assert shard_arrivals([3, 1, 2, 5, 4, 6, 1, 1], 4) == [3, 5, 6, 1]
    assert shard_arrivals([3, 1], 4) == [3, 3, 1, 1]


def test_the_same_samples_on_more_engines_are_never_slower() -> None:
    everything: dict[str, Any] = defaults("gpu").generation.model_dump()
    lengths = Lengths(prompt=200, response=300, longest=1000)
    slowest = [max(engine(128, **everything).finish_times(1024 // engines, lengths)) for engines in (1, 2, 4, 8)]
    assert all(more <= fewer for fewer, more in pairwise(slowest))
