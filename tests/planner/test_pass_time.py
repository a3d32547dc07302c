"""Seconds of passes, optimizer steps and collectives, against formulas worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest

from rlhf_ray.config.training import Lora, TrainingEngine
from rlhf_ray.models.shapes import ModelShape
from rlhf_ray.planner.calibration import Calibration, Collectives, OptimizerRates, Pass, defaults
from rlhf_ray.planner.pass_time import ProcessGroup, Ranks, Rates
from rlhf_ray.planner.work import Sequences, layer_parameters, touched_parameters

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
MIXTRAL = {**LLAMA_3_8B, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000}
SHAPE = ModelShape.of(LLAMA_3_8B, "llama")
LAYERS = 32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336)
"""Weights of the linear layers of Llama 3 8B."""
SEQUENCES = Sequences.of(64, 256, 768)
RATES = Rates(
    bfloat16=1e15, float32=1e14, memory=1e12, host=1e10, host_memory=1e11, disk=1e9, link=1e11, network=1e10, ahead=True
)
NOTHING = Pass(products=0, attention=0, elementwise=0, vocabulary=0, weights=0, layer_s=0)
PRODUCTS = NOTHING.model_copy(update={"products": 2.0})


def constants(**sections: Any) -> Calibration:
    free = {
        "scoring": NOTHING,
        "training": NOTHING,
        "optimizer": OptimizerRates(traffic=0, step_s=0),
        "collectives": Collectives(all_reduce=0, all_gather=0, reduce_scatter=0, call_s=0),
    }
    return defaults("gpu").model_copy(update={**free, **sections})


def ranks(count: int = 1, *, nodes: int = 1, lora: Lora | None = None, engine: Any = None, **sections: Any) -> Ranks:
    settings = TrainingEngine.model_validate(
        {"zero_stage": 2, "dtype": "bfloat16", "micro_batch_tokens": 1024, **(engine or {})}
    )
    group = ProcessGroup(count, nodes, RATES.link, RATES.network)
    return Ranks(SHAPE, settings, RATES, group, constants(**sections), lora)


def test_products_are_two_operations_for_each_weight_and_token() -> None:
    assert layer_parameters(SHAPE) == pytest.approx(LAYERS, rel=1e-4)  # beside them are norms
    head = 4096 * 128256
    products = 2 * (LAYERS * SEQUENCES.tokens + head * SEQUENCES.scored)
    assert ranks(scoring=PRODUCTS).scoring_s(SEQUENCES) == pytest.approx(2.0 * products / 1e15, rel=1e-4)


def test_training_computes_three_times_as_much_and_the_heads_logits_again() -> None:
    head = 2 * 4096 * 128256 * SEQUENCES.scored
    expected = 2.0 * (3 * 2 * LAYERS * SEQUENCES.tokens + 4 * head) / 1e15
    assert ranks(training=PRODUCTS).accumulate_s(SEQUENCES) == pytest.approx(expected, rel=1e-4)


def test_twice_the_samples_take_twice_the_time() -> None:
    model = ranks(training=defaults("gpu").training)
    twice = Sequences.of(128, 256, 768)
    assert model.accumulate_s(twice) == pytest.approx(2 * model.accumulate_s(SEQUENCES))


def test_ranks_share_the_samples() -> None:
    alone, four = (ranks(count, training=defaults("gpu").training) for count in (1, 4))
    assert four.accumulate_s(SEQUENCES) == pytest.approx(alone.accumulate_s(SEQUENCES) / 4)
    # 65 samples leave one rank with 17.
    assert four.accumulate_s(Sequences.of(65, 256, 768)) == pytest.approx(17 / 16 * four.accumulate_s(SEQUENCES))


def test_longer_sequences_cost_more_than_their_tokens_by_their_attention() -> None:
    factors = {"scoring": NOTHING.model_copy(update={"attention": 1.0})}
    short, long = Sequences.of(64, 0, 1024), Sequences.of(16, 0, 4096)
    assert short.tokens == long.tokens
    assert ranks(**factors).scoring_s(long) == pytest.approx(4 * ranks(**factors).scoring_s(short), rel=1e-3)
    pairs = 64 * 1024 * 1025 / 2
    assert ranks(**factors).scoring_s(short) == pytest.approx(4 * 4096 * 32 * pairs / 1e15)


def test_checkpointing_repeats_the_layers_forward_pass() -> None:
    plain, again = (
        ranks(training=PRODUCTS, scoring=PRODUCTS, engine={"activation_checkpointing": on}) for on in (False, True)
    )
    repeated = 2.0 * 2 * LAYERS * SEQUENCES.tokens / 1e15
    assert again.accumulate_s(SEQUENCES) - plain.accumulate_s(SEQUENCES) == pytest.approx(repeated, rel=1e-4)


def test_adapters_leave_out_the_gradients_of_weights_and_most_of_the_optimizer() -> None:
    whole, adapters = (
        ranks(training=PRODUCTS, optimizer=OptimizerRates(traffic=1, step_s=0), lora=lora)
        for lora in (None, Lora(rank=16))
    )
    assert adapters.trained == 16 * 32 * sum(map(sum, [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(4096, 14336)] * 3))
    head = 2 * 4096 * 128256 * SEQUENCES.scored
    assert adapters.accumulate_s(SEQUENCES) == pytest.approx(
        2.0 * (2 * 2 * LAYERS * SEQUENCES.tokens + 3 * head) / 1e15, rel=1e-3
    )
    assert adapters.step_s() < 0.01 * whole.step_s()


def test_each_micro_batch_pays_for_its_layers_and_weights() -> None:
    weights = NOTHING.model_copy(update={"weights": 1.0})
    one, four = (ranks(training=weights, engine={"micro_batch_tokens": tokens}) for tokens in (16 * 1024, 4 * 1024))
    assert one.accumulate_s(SEQUENCES) == pytest.approx(4 * 3 * 2 * SHAPE.parameters / 1e12)
    assert four.accumulate_s(SEQUENCES) == pytest.approx(4 * one.accumulate_s(SEQUENCES))


def test_a_gpu_hides_what_a_cpu_must_wait_for() -> None:
    factors = PRODUCTS.model_copy(update={"layer_s": 1e-9})
    gpu = ranks(scoring=factors)
    cpu = replace(gpu, rates=replace(RATES, ahead=False))
    assert cpu.scoring_s(SEQUENCES) == pytest.approx(gpu.scoring_s(SEQUENCES) + 64 * 32 * 1e-9)


def test_numbers_of_float32_take_longer_where_memory_is_what_counts_and_not_on_a_cpu() -> None:
    factors = NOTHING.model_copy(update={"elementwise": 1.0})
    for on_gpu, ratio in ((True, 2.0), (False, 1.0)):
        half, full = (
            replace(ranks(scoring=factors, engine={"dtype": dtype}), rates=replace(RATES, ahead=on_gpu))
            for dtype in ("bfloat16", "float32")
        )
        assert full.scoring_s(SEQUENCES) == pytest.approx(ratio * half.scoring_s(SEQUENCES))


@pytest.mark.parametrize(
    ("stage", "sent"),
    [
        (0, 2.0),  # a sum of all gradients
        (1, 2.0 + 1.0),  # and new weights gathered
        (2, 16 * 2.0 + 1.0),  # the sum in each of 16 micro-batches
        (3, 16 * (2.0 + 1.0)),  # weights gathered forward and backward, each rank's part of the sum
    ],
)
def test_bytes_that_ranks_send_in_each_stage(stage: int, sent: float) -> None:
    model = ranks(
        4,
        engine={"zero_stage": stage},
        collectives=Collectives(all_reduce=1, all_gather=1, reduce_scatter=1, call_s=0),
    )
    seconds = model.accumulate_s(SEQUENCES) + model.step_s()
    assert seconds == pytest.approx(sent * 0.75 * 2 * SHAPE.parameters / 1e11)


def test_ranks_on_several_nodes_talk_at_the_networks_pace() -> None:
    factors = Collectives(all_reduce=1, all_gather=1, reduce_scatter=1, call_s=0)
    near, far = (ProcessGroup(16, nodes, 1e11, 1e10).all_reduce_s(1e9, factors) for nodes in (1, 2))
    assert far == pytest.approx(10 * near)
    assert ProcessGroup(1, 1, 1e11, 1e10).all_reduce_s(1e9, factors) == 0


def test_optimizer_state_is_shared_by_ranks_but_for_stage_0() -> None:
    def step_s(stage: int) -> float:
        return ranks(4, engine={"zero_stage": stage}, optimizer=OptimizerRates(traffic=1, step_s=0)).step_s()

    assert step_s(0) == pytest.approx(50 * SHAPE.parameters / 1e12)
    assert step_s(1) == step_s(3) == pytest.approx(step_s(0) / 4)


def test_an_offloaded_optimizer_steps_in_host_memory_and_its_weights_travel() -> None:
    offloaded = ranks(4, engine={"offload_optimizer": "cpu"}, optimizer=OptimizerRates(traffic=1, step_s=0))
    own = SHAPE.parameters / 4
    assert offloaded.step_s() == pytest.approx(50 * own / 1e11 + 2 * 2 * own / 1e10)


def test_of_experts_only_those_that_tokens_are_sent_to_are_read() -> None:
    mixtral = ModelShape.of(MIXTRAL, "mixtral")
    assert touched_parameters(mixtral, 1) == pytest.approx(layer_parameters(mixtral) + mixtral.head_parameters)
    everything = mixtral.parameters - mixtral.embedding_parameters
    assert touched_parameters(mixtral, 1000) == pytest.approx(everything)


def test_ranks_that_share_sequences_have_a_part_of_their_tokens_and_exchange_states() -> None:
    factors = {"scoring": PRODUCTS, "collectives": Collectives(all_reduce=0, all_gather=1, reduce_scatter=0, call_s=0)}
    alone, shared = (ranks(4, engine={"sequence_parallel": sharing}, **factors) for sharing in (1, 4))
    states = 2 * (32 + 8) * 128 * 2 * 32
    exchanged = SEQUENCES.tokens / 4 * states * 3 / 4 / 1e11
    assert shared.scoring_s(SEQUENCES) == pytest.approx(alone.scoring_s(SEQUENCES) + exchanged)
    # A single sequence has one rank to compute it, or four.
    one = Sequences.of(1, 0, 8192)
    assert alone.scoring_s(one) > 3 * shared.scoring_s(one)


def test_what_is_on_disks_is_read_and_written_at_their_pace() -> None:
    def step_s(place: str) -> float:
        engine = {"zero_stage": 3, "offload_optimizer": place, "nvme_path": "/disk" if place == "nvme" else None}
        return ranks(4, engine=engine).step_s()

    assert step_s("nvme") - step_s("cpu") == pytest.approx(2 * 12 * SHAPE.parameters / 4 / 1e9)
