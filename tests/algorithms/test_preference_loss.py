"""Promises of rlhf_ray.algorithms.preference_loss, against plain Python floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.errors import TensorInputError
from rlhf_ray.algorithms.preference_loss import bradley_terry_loss

score = st.floats(-15, 15)


@settings(deadline=None)
@given(st.lists(st.tuples(score, score), max_size=30))
def test_loss_equals_a_loop_in_float64(pairs: list[tuple[float, float]]) -> None:
    chosen, rejected = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).unbind(1)
    # the probability of Bradley and Terry: strength over the sum of both strengths
    want = [-math.log(math.exp(c) / (math.exp(c) + math.exp(r))) for c, r in pairs]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(want, rel=1e-7, abs=1e-12)


def test_loss_has_hand_worked_values() -> None:
    log3 = math.log(3)
    loss = bradley_terry_loss(torch.tensor([1.0, log3, 0.0]), torch.tensor([1.0, 0.0, log3]))
    assert loss.tolist() == pytest.approx([math.log(2), math.log(4 / 3), math.log(4)])


def test_loss_stays_finite_for_extreme_scores() -> None:
    loss = bradley_terry_loss(torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4]))
    assert loss.tolist() == [0.0, 2e4]


def test_descent_raises_the_chosen_and_lowers_the_rejected_score() -> None:
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    bradley_terry_loss(chosen, rejected).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == (-0.5, 0.5)


def test_pairs_that_do_not_match_are_refused() -> None:
    with pytest.raises(TensorInputError, match="rejected"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(1))
