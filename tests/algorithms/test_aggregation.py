"""Promises of rlhf_ray.algorithms.aggregation, against plain Python floats."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.aggregation import AggregationMode, token_weights
from rlhf_ray.algorithms.errors import OptionError, SampleError, TensorInputError

modes: st.SearchStrategy[AggregationMode] = st.sampled_from(["token", "sample"])
losses = st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=12), min_size=1, max_size=12)  # samples of tokens


def naive_mean(samples: list[list[float]], mode: AggregationMode) -> float:
    if mode == "token":
        flat = [loss for sample in samples for loss in sample]
        return sum(flat) / len(flat)
    return sum(sum(sample) / len(sample) for sample in samples) / len(samples)


def weighted_sum(micro_batch: list[list[float]], mode: AggregationMode, tokens: int, samples: int) -> float:
    lengths = torch.tensor([len(sample) for sample in micro_batch], dtype=torch.int64)
    flat = torch.tensor([loss for sample in micro_batch for loss in sample], dtype=torch.float64)
    weights = token_weights(lengths, mode, tokens, samples)
    assert weights.dtype == torch.float32
    return float((weights.double() * flat).sum())


@settings(deadline=None)
@given(losses, modes)
def test_weighted_sum_is_the_mean_over_tokens_or_samples(samples: list[list[float]], mode: AggregationMode) -> None:
    got = weighted_sum(samples, mode, sum(map(len, samples)), len(samples))
    assert got == pytest.approx(naive_mean(samples, mode), rel=1e-6, abs=1e-5)


@settings(deadline=None)
@given(losses, modes, st.data())
def test_any_split_and_order_of_a_step_gives_the_same_loss(
    samples: list[list[float]], mode: AggregationMode, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(samples))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(samples)), max_size=5)))
    edges = [0, *cuts, len(samples)]
    micro_batches = [order[a:b] for a, b in pairwise(edges)]  # some of them empty
    tokens = sum(map(len, samples))
    got = sum(weighted_sum(micro_batch, mode, tokens, len(samples)) for micro_batch in micro_batches)
    assert got == pytest.approx(naive_mean(samples, mode), rel=1e-6, abs=1e-5)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=10), modes)
def test_the_weight_of_a_sample_is_bit_equal_in_any_micro_batch(lengths: list[int], mode: AggregationMode) -> None:
    together = token_weights(torch.tensor(lengths), mode, sum(lengths), len(lengths))
    alone = [token_weights(torch.tensor([n]), mode, sum(lengths), len(lengths)) for n in lengths]
    assert torch.equal(together, torch.cat(alone))


def test_weights_have_hand_worked_values() -> None:
    lengths = torch.tensor([1, 4])
    assert token_weights(lengths, "token", 10, 4).tolist() == pytest.approx([0.1] * 5)
    assert token_weights(lengths, "sample", 10, 4).tolist() == [0.25, 0.0625, 0.0625, 0.0625, 0.0625]


def test_totals_of_the_micro_batch_instead_of_the_step_are_refused() -> None:
    with pytest.raises(OptionError, match="step_tokens is 4, but must be at least the 5 of this micro-batch"):
        token_weights(torch.tensor([1, 4]), "token", 4, 2)
    with pytest.raises(OptionError, match="step_samples is 1, but must be at least the 2 of this micro-batch"):
        token_weights(torch.tensor([1, 4]), "sample", 5, 1)


def test_bad_lengths_and_unknown_modes_are_refused() -> None:
    with pytest.raises(SampleError, match="positions 1 have no response token"):
        token_weights(torch.tensor([1, 0]), "sample", 5, 5)
    with pytest.raises(TensorInputError, match="int64"):
        token_weights(torch.tensor([1.0]), "token", 5, 5)
    with pytest.raises(OptionError, match="mode is 'batch', but must be token or sample"):
        token_weights(torch.tensor([1]), "batch", 5, 5)  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    samples=st.lists(st.lists(st.booleans(), min_size=1, max_size=8), min_size=1, max_size=6),
    mode=st.sampled_from(["token", "sample"]),
)
def test_masked_tokens_weigh_nothing_and_the_others_as_if_alone(
    samples: list[list[bool]], mode: AggregationMode
) -> None:
    samples = [[*mask, True] for mask in samples]
    mask = torch.tensor([counts for sample in samples for counts in sample])
    actions = torch.tensor([sum(sample) for sample in samples])
    weights = token_weights(torch.tensor(list(map(len, samples))), mode, 100, 10, mask)
    assert weights[~mask].tolist() == [0.0] * int((~mask).sum())
    assert weights[mask].tolist() == token_weights(actions, mode, 100, 10).tolist()


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(TensorInputError, match="loss_mask"):
        token_weights(torch.tensor([2, 1]), "token", 10, 4, torch.ones(4, dtype=torch.bool))
