"""Promises of rlhf_ray.algorithms.preference.odds, against exact decimals."""

import math
from decimal import Decimal

import pytest
import torch
from decimals import assert_finite_in_float32, columns, gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.errors import SampleError, TensorInputError
from rlhf_ray.algorithms.preference.odds import nll_loss, odds_ratio_loss

MEAN = st.floats(-50, -1e-12) | st.floats(-1e4, -50) | st.floats(-1e-3, -1e-12)
EDGES = [0.0, -1e-45, -1e-30, -1e-12, -1e-7, -1e-3, -0.5, -17.0, -90.0, -1e4, -1e15]


def odds(mean: float) -> Decimal:
    p = Decimal(mean).exp()
    return p / (1 - p)


@settings(deadline=None)
@given(st.lists(st.tuples(MEAN, MEAN), max_size=5))
def test_odds_ratio_loss_equals_an_exact_formula(pairs: list[tuple[float, float]]) -> None:
    # -log σ(log q) = log(1 + 1/q)
    want = [float((1 + odds(rejected) / odds(chosen)).ln()) for chosen, rejected in pairs]
    assert odds_ratio_loss(*columns(pairs)).tolist() == pytest.approx(want, rel=1e-9, abs=1e-11)


def test_odds_ratio_loss_has_hand_worked_values() -> None:
    # probabilities 3/4, 1/2 and 1/4 have odds 3, 1 and 1/3
    chosen, rejected = torch.tensor([0.75, 0.5, 0.75, 0.25]).log(), torch.tensor([0.5, 0.75, 0.25, 0.25]).log()
    # -log σ(log 3) = log 4/3; -log σ(-log 3) = log 4; -log σ(log 9) = log 10/9; log 2
    want = [0.28768207, 1.38629436, 0.10536052, 0.69314718]
    assert odds_ratio_loss(chosen, rejected).tolist() == pytest.approx(want)


def test_equal_answers_give_log_two_however_likely() -> None:
    means = torch.tensor(EDGES)
    assert odds_ratio_loss(means, means).tolist() == pytest.approx([math.log(2)] * len(EDGES))


def test_certain_answers_count_as_the_named_bound() -> None:
    # odds of e^-1e-12 are 1e12, those of 1/2 are 1; log(1 + 1e12) = 27.6310211
    certain, even = torch.zeros(1), torch.tensor([0.5]).log()
    assert odds_ratio_loss(even, certain).tolist() == pytest.approx([27.6310211])
    assert odds_ratio_loss(certain, even).tolist() == pytest.approx([1e-12])
    _, gradient, _ = gradients(odds_ratio_loss, [-5e-13], [-0.5])
    assert gradient.item() == 0


def test_unlikely_answers_compare_like_their_log_probs() -> None:
    # odds and probabilities are one at e^-1000, so the loss is softplus of the difference: log(1 + e^2) = 2.12692801
    assert odds_ratio_loss(torch.tensor([-1002.0]), torch.tensor([-1000.0])).tolist() == pytest.approx([2.12692801])


def test_descent_raises_the_chosen_and_lowers_the_rejected() -> None:
    means = [-1e-9, -1e-3, -0.5, -3.0, -40.0]
    _, chosen, rejected = gradients(odds_ratio_loss, means, means[::-1])
    assert (chosen < 0).all()
    assert (rejected > 0).all()
    # d log odds / d mean = 1 / (1 - p): at p = 1/2 on both sides the slope is -1/2 · 2
    _, chosen, rejected = gradients(odds_ratio_loss, [math.log(0.5)], [math.log(0.5)])
    assert (chosen.item(), rejected.item()) == pytest.approx((-1.0, 1.0))


def test_odds_ratio_loss_stays_finite_in_float32() -> None:
    chosen = [mean for mean in EDGES for _ in EDGES]
    assert_finite_in_float32(odds_ratio_loss, chosen, EDGES * len(EDGES))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1e4, 0), st.integers(1, 4096)), max_size=8))
def test_nll_equals_a_loop_in_float64(answers: list[tuple[float, int]]) -> None:
    logprobs = torch.tensor([p for p, _ in answers], dtype=torch.float64)
    lengths = torch.tensor([n for _, n in answers], dtype=torch.int64)
    assert nll_loss(logprobs, lengths).tolist() == pytest.approx([-p / n for p, n in answers], rel=1e-12)


def test_nll_has_hand_worked_values_and_descent_raises_the_log_prob() -> None:
    lengths = torch.tensor([3, 4])
    losses, slope = gradients(lambda logprobs: nll_loss(logprobs, lengths), [-6.0, -1.0], dtype=torch.float32)
    assert losses.tolist() == [2.0, 0.25]  # 6 / 3, 1 / 4
    assert slope.tolist() == pytest.approx([-1 / 3, -0.25])


def test_inputs_that_do_not_match_are_refused() -> None:
    with pytest.raises(TensorInputError, match="rejected_means"):
        odds_ratio_loss(torch.zeros(2), torch.zeros(1))
    with pytest.raises(TensorInputError, match="lengths"):
        nll_loss(torch.zeros(2), torch.tensor([3]))
    with pytest.raises(SampleError, match="positions 1"):
        nll_loss(torch.zeros(2), torch.tensor([3, 0]))
