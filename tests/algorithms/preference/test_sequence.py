"""Promises of rlhf_ray.algorithms.preference.sequence, against plain Python floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.errors import OptionError, SampleError, TensorInputError
from rlhf_ray.algorithms.preference.sequence import (
    length_desensitised_weights,
    sampled_alignment,
    sum_by_answer,
    wpo_weights,
)

answers = st.lists(st.lists(st.tuples(st.floats(-50, 0), st.floats(-12, 0)), min_size=1, max_size=9), max_size=8)


def lengths_of(*lengths: int) -> torch.Tensor:
    return torch.tensor(lengths, dtype=torch.int64)


@settings(deadline=None)
@given(answers)
def test_sums_and_alignments_equal_a_loop_in_float64(answers: list[list[tuple[float, float]]]) -> None:
    flat = [token for answer in answers for token in answer]
    logprobs, collisions = torch.tensor(flat, dtype=torch.float64).reshape(-1, 2).unbind(1)
    lengths = lengths_of(*map(len, answers))
    sums = [math.fsum(p for p, _ in answer) for answer in answers]
    means = [math.fsum(p - c for p, c in answer) / len(answer) for answer in answers]
    assert sum_by_answer(logprobs, lengths).tolist() == pytest.approx(sums, rel=1e-12, abs=1e-12)
    assert sampled_alignment(logprobs, collisions, lengths).tolist() == pytest.approx(means, rel=1e-12, abs=1e-12)


def test_sums_have_hand_worked_values_and_a_gradient_per_token() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], requires_grad=True)
    sums = sum_by_answer(values, lengths_of(1, 3, 2))
    assert sums.tolist() == [1.0, 9.0, 11.0]  # 1, 2+3+4, 5+6
    (gradient,) = torch.autograd.grad((sums * torch.tensor([1.0, 10.0, 100.0])).sum(), values)
    assert gradient.tolist() == [1.0, 10.0, 10.0, 10.0, 100.0, 100.0]


def test_a_sum_is_the_nearest_float32_whatever_lies_beside_it() -> None:
    torch.manual_seed(0)
    values, others = -torch.rand(5000), -1e4 * torch.rand(5000)
    want = torch.tensor(math.fsum(values.tolist())).item()
    assert sum_by_answer(values, lengths_of(5000)).dtype == torch.float32
    assert sum_by_answer(values, lengths_of(5000)).item() == want
    assert sum_by_answer(torch.cat([others, values]), lengths_of(5000, 5000))[1].item() == want


def test_lengths_that_do_not_add_up_and_empty_answers_are_refused() -> None:
    with pytest.raises(TensorInputError, match="values has 3 tokens, but needs 4"):
        sum_by_answer(torch.zeros(3), lengths_of(2, 2))
    with pytest.raises(SampleError, match="positions 1 have no response token"):
        sum_by_answer(torch.zeros(3), lengths_of(3, 0))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=8), st.floats(0, 1))
def test_weights_past_the_public_length_equal_a_loop(pairs: list[tuple[int, int]], alpha: float) -> None:
    public = [min(pair) for pair in pairs]
    for side in (0, 1):
        lengths = [pair[side] for pair in pairs]
        want = [1.0 if t < p else alpha for n, p in zip(lengths, public, strict=True) for t in range(n)]
        got = length_desensitised_weights(lengths_of(*lengths), lengths_of(*public), alpha)
        assert got.dtype == torch.float32
        assert got.tolist() == pytest.approx(want, rel=1e-6, abs=1e-40)


def test_weights_have_hand_worked_values() -> None:
    # answers of 3, 1 and 2 tokens whose pairs share 1, 1 and 2
    weights = length_desensitised_weights(lengths_of(3, 1, 2), lengths_of(1, 1, 2), 0.25)
    assert weights.tolist() == [1.0, 0.25, 0.25, 1.0, 1.0, 1.0]


def test_alpha_one_is_the_plain_sum_and_alpha_zero_cuts_to_the_public_length() -> None:
    logprobs, lengths, public = -torch.arange(1.0, 6.0), lengths_of(3, 2), lengths_of(2, 1)
    whole = sum_by_answer(length_desensitised_weights(lengths, public, 1.0) * logprobs, lengths)
    cut = sum_by_answer(length_desensitised_weights(lengths, public, 0.0) * logprobs, lengths)
    assert whole.tolist() == [-6.0, -9.0]  # 1+2+3, 4+5
    assert cut.tolist() == [-3.0, -4.0]  # 1+2, 4


def test_wrong_public_lengths_and_alphas_are_refused() -> None:
    with pytest.raises(SampleError, match="positions 1 have no public length from 1 to their own"):
        length_desensitised_weights(lengths_of(3, 2), lengths_of(3, 3), 0.5)
    with pytest.raises(SampleError, match="positions 0"):
        length_desensitised_weights(lengths_of(3, 2), lengths_of(0, 2), 0.5)
    with pytest.raises(TensorInputError, match="public_lengths"):
        length_desensitised_weights(lengths_of(3, 2), lengths_of(3), 0.5)
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(OptionError, match="alpha"):
            length_desensitised_weights(lengths_of(3), lengths_of(3), alpha)


def test_alignment_and_weights_have_hand_worked_values() -> None:
    # tokens of probability 1/2 and 1/4 where a sampled one has 1/2: log-ratios 0 and -log 2, their mean -0.3466
    logprobs, collisions = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    alignment = sampled_alignment(logprobs, collisions, lengths_of(2))
    assert alignment.tolist() == pytest.approx([-0.34657359])
    # exp(-0.3466 - 0.3466) = 1/2; exp(-0.3466 + 0.1) = 0.7815; exp(-0.3466 + 1) is above 1
    weights = wpo_weights(alignment.expand(3), torch.tensor([-0.34657359, 0.1, 1.0]))
    assert weights.tolist() == pytest.approx([0.5, 0.78147379, 1.0])


def test_an_answer_from_a_uniform_policy_is_aligned() -> None:
    # 8 equally likely tokens: log p = -log 8 and Σ p² = 8 / 64
    tokens = torch.full((5,), -math.log(8))
    assert sampled_alignment(tokens, tokens.clone(), lengths_of(5)).tolist() == [0.0]


def test_wpo_weights_are_detached_bounded_and_finite() -> None:
    extremes = torch.tensor([1e30, 1e4, 0.0, -1e4, -1e30], requires_grad=True)
    weights = wpo_weights(extremes, extremes)
    assert not weights.requires_grad
    assert weights.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_alignments_that_do_not_match_are_refused() -> None:
    with pytest.raises(TensorInputError, match="collisions"):
        sampled_alignment(torch.zeros(3), torch.zeros(1), lengths_of(3))
    with pytest.raises(TensorInputError, match="rejected_alignment"):
        wpo_weights(torch.zeros(3), torch.zeros(1))
