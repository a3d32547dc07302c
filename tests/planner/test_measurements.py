"""From measurements to factors: a machine whose factors are known is measured, and they are found again."""

from dataclasses import replace

import numpy as np
import pytest

from rlhf_ray.config.training import TrainingEngine
from rlhf_ray.models.shapes import ModelShape
from rlhf_ray.planner.calibration import Calibration, ProcessMemory, RayRates, Start, defaults
from rlhf_ray.planner.decoding_time import DecodingEngine
from rlhf_ray.planner.measurements import (
    CollectiveSeconds,
    DecodeSeconds,
    Measurements,
    PassSeconds,
    SyncSeconds,
    calibration_of,
    fit_factors,
)
from rlhf_ray.planner.pass_time import ProcessGroup, Ranks, Rates
from rlhf_ray.planner.work import Sequences

FLOPS = {"bfloat16": 2e12, "float32": 2e11}
MEMORY, LINK = 2e10, 3e9
RATES = Rates(2e12, 2e11, MEMORY, 1.0, MEMORY, 1.0, LINK, LINK, ahead=False)
KNOWN = defaults("cpu").model_copy(
    update={
        "scoring": defaults("cpu").scoring.model_copy(update={"products": 1.9, "elementwise": 0.7, "attention": 4.0}),
        "training": defaults("cpu").training.model_copy(update={"products": 2.3, "vocabulary": 2.0, "layer_s": 0.004}),
    }
)
SAMPLES = [
    Sequences.of(16, 124, 4),
    Sequences.of(2, 1020, 4),
    Sequences.of(16, 32, 32),
    Sequences.of(2, 28, 4),
]


def shape(hidden: int, layers: int, intermediate: int, vocab: int) -> ModelShape:
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": hidden // 64,
        "num_hidden_layers": layers,
        "num_key_value_heads": hidden // 256,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
    }
    return ModelShape.of(config, f"llama {hidden}")


SHAPES = [shape(256, 2, 704, 4096), shape(512, 10, 1408, 8192), shape(1024, 4, 2816, 32768)]
ALONE = ProcessGroup(1, 1, LINK, LINK)


def ranks(of: ModelShape, constants: Calibration) -> Ranks:
    return Ranks(of, TrainingEngine(dtype="bfloat16", micro_batch_tokens=4096), RATES, ALONE, constants)


def engine(of: ModelShape, constants: Calibration) -> DecodingEngine:
    return DecodingEngine(of, "bfloat16", 64, 1, RATES, ALONE, constants)


def passes(of: ModelShape, sequences: Sequences) -> PassSeconds:
    model = ranks(of, KNOWN)
    return PassSeconds(of, sequences, model.scoring_s(sequences), model.accumulate_s(sequences), model.step_s())


def decoding(of: ModelShape, sequences: int, prompt: int) -> DecodeSeconds:
    model = engine(of, KNOWN)
    first = model.prompt_s(sequences * prompt) + 4 * model.step_s(sequences, prompt + 2)
    step = model.step_s(sequences, prompt + 16)
    return DecodeSeconds(of, sequences, prompt, 4, 28, first, first + 24 * step)


def syncs(of: ModelShape) -> SyncSeconds:
    factors = KNOWN.weight_sync
    tensors = sum(tensor.count for tensor in of.tensors())
    seconds = factors.sync_s + tensors * factors.tensor_s + factors.weights * 2 * of.parameters / LINK
    return SyncSeconds(of, seconds)


MEASURED = Measurements(
    device="cpu",
    machine="a known machine",
    threads=2,
    dtype="bfloat16",
    flops=FLOPS,  # type: ignore[arg-type]
    memory=MEMORY,
    passes=[passes(of, sequences) for of in SHAPES for sequences in SAMPLES],
    decoding=[decoding(of, *batch) for of in SHAPES for batch in ((1, 16), (8, 16), (48, 16), (16, 384))],
    syncs=[syncs(of) for of in SHAPES],
    pause_s=KNOWN.weight_sync.sync_s,
    collectives=CollectiveSeconds(
        64_000_000,
        {
            "broadcast": 64e6 / LINK,
            "all_reduce": 2 * 64e6 / LINK + 0.001,
            "all_gather": 0.5 * 64e6 / LINK + 0.001,
            "reduce_scatter": 64e6 / LINK + 0.001,
            "call": 0.001,
        },
    ),
    ray=RayRates(call_s=0.0005, object_store_gb_s=1.5),
    start=Start(process_s=9, engine_s=20, load_gb_s=0.5),
    memory_of=ProcessMemory(rank_mib=700),
)


def test_times_of_a_model_of_another_size_are_predicted() -> None:
    found = calibration_of(MEASURED)
    other = shape(768, 20, 2048, 49152)
    for sequences in (Sequences.of(32, 60, 60), Sequences.of(4, 1000, 24), Sequences.of(1, 200, 100)):
        mine, known = ranks(other, found), ranks(other, KNOWN)
        assert mine.scoring_s(sequences) == pytest.approx(known.scoring_s(sequences), rel=1e-3)
        assert mine.accumulate_s(sequences) == pytest.approx(known.accumulate_s(sequences), rel=1e-3)
        assert mine.step_s() == pytest.approx(known.step_s(), rel=1e-3)
    for batch, context in ((1, 100), (24, 300), (64, 800)):
        known_s = engine(other, KNOWN).step_s(batch, context)
        assert engine(other, found).step_s(batch, context) == pytest.approx(known_s, rel=0.01)
    assert engine(other, found).prompt_s(1000) == pytest.approx(engine(other, KNOWN).prompt_s(1000), rel=0.05)


def test_rates_are_those_of_one_core() -> None:
    rates = calibration_of(MEASURED).rates
    assert rates is not None
    assert (rates.bfloat16_tflops, rates.float32_tflops) == (1.0, 0.1)
    assert (rates.memory_gb_s, rates.link_gb_s) == (10.0, 3.0)


def test_collectives_are_told_as_times_of_what_ranks_send() -> None:
    found = calibration_of(MEASURED).collectives
    assert (found.all_reduce, found.all_gather, found.reduce_scatter) == pytest.approx((2.0, 1.0, 2.0))
    assert found.call_s == 0.001


def test_a_sync_is_split_into_bytes_tensors_and_a_pause() -> None:
    assert calibration_of(MEASURED).weight_sync.model_dump() == pytest.approx(KNOWN.weight_sync.model_dump())


def test_what_was_not_measured_is_the_default_and_said_to_be() -> None:
    alone = replace(MEASURED, device="gpu", threads=None, collectives=None, syncs=[])
    found = calibration_of(alone)
    assert found.collectives == defaults("gpu").collectives
    assert found.weight_sync == defaults("gpu").weight_sync
    assert not {"collectives", "weight_sync"} & set(found.measured)
    assert {"rates", "scoring", "training", "optimizer", "generation"} <= set(found.measured)
    assert found.rates is not None
    assert found.rates.link_gb_s is None


RANDOM = np.random.default_rng(3)
IDEAL = [{name: float(RANDOM.uniform(0.1, 5)) for name in ("products", "moved", "constant")} for _ in range(8)]


def seconds(factors: dict[str, float]) -> list[float]:
    return [sum(factors[name] * row[name] for name in factors) for row in IDEAL]


def test_exact_measurements_give_back_their_factors() -> None:
    factors = {"products": 1.5, "moved": 0.25, "constant": 0.01}
    assert fit_factors(IDEAL, seconds(factors)) == pytest.approx(factors)


def test_no_factor_is_negative_where_least_squares_alone_would_make_it_so() -> None:
    found = fit_factors(IDEAL, seconds({"products": 2.0, "moved": 1.0, "constant": -0.5}))
    assert min(found.values()) >= 0
    assert found["constant"] == 0


def test_a_term_that_no_measurement_has_gets_no_factor() -> None:
    ideal = [{**row, "moved": 0.0} for row in IDEAL]
    measured = [2 * row["products"] + 3 * row["constant"] for row in ideal]
    assert fit_factors(ideal, measured) == pytest.approx({"products": 2, "moved": 0, "constant": 3})


def test_what_is_known_is_kept_and_the_rest_found() -> None:
    factors = {"products": 1.5, "moved": 0.25, "constant": 0.01}
    assert fit_factors(IDEAL, seconds(factors), {"moved": 0.25}) == pytest.approx(factors)
    assert fit_factors(IDEAL, seconds(factors), {"moved": 0.0})["moved"] == 0.0


def test_a_small_measurement_counts_as_much_as_a_large_one() -> None:
    ideal = [{"products": 1.0}, {"products": 1000.0}]
    # Relative errors of both are equal and opposite, where absolute ones would leave all of it to the first.
    found = fit_factors(ideal, [2.0, 1000.0])["products"]
    assert found == pytest.approx((1 / 2 + 1) / (1 / 4 + 1))


def test_noise_moves_predictions_by_no_more_than_itself() -> None:
    factors = {"products": 1.5, "moved": 0.25, "constant": 0.01}
    noisy = [second * float(RANDOM.uniform(0.95, 1.05)) for second in seconds(factors)]
    found = fit_factors(IDEAL, noisy)
    for row, exact in zip(IDEAL, seconds(factors), strict=True):
        assert sum(found[name] * row[name] for name in found) == pytest.approx(exact, rel=0.06)
