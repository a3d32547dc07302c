"""Promises of rlhf_ray.algorithms.preference.transport, against exact decimals."""

import math
from collections.abc import Callable
from decimal import Decimal

import pytest
import torch
from decimals import BETA, EXTREMES, LOG_PROB, assert_finite_in_float32, columns, gradients, sigma
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algorithms.errors import OptionError, TensorInputError
from rlhf_ray.algorithms.preference.margin import sigmoid_loss
from rlhf_ray.algorithms.preference.transport import aot_paired_loss, aot_unpaired_loss

Loss = Callable[..., Tensor]
both = pytest.mark.parametrize("loss", [aot_paired_loss, aot_unpaired_loss])
pairs_of_any_order = st.lists(st.tuples(LOG_PROB, LOG_PROB | st.integers(-2, 2).map(float)), max_size=7)


@both
@settings(deadline=None)
@given(pairs=pairs_of_any_order, beta=BETA, smoothing=st.floats(0, 0.5))
def test_losses_equal_an_exact_formula_of_sorted_lists(
    loss: Loss, pairs: list[tuple[float, float]], beta: float, smoothing: float
) -> None:
    e, want = Decimal(smoothing), []
    for first, second in zip(sorted(p[0] for p in pairs), sorted(p[1] for p in pairs), strict=True):
        z = Decimal(beta) * (Decimal(first) - Decimal(second))
        want.append(float(-(1 - e) * sigma(z).ln() - e * sigma(-z).ln()))
    got = loss(*columns(pairs), beta, smoothing)
    # row i of the result is row i of the first vector, the list above is in its ascending order
    in_order = got[columns(pairs)[0].argsort(stable=True)]
    assert in_order.tolist() == pytest.approx(want, rel=1e-9, abs=1e-11)


@both
def test_losses_have_hand_worked_values(loss: Loss) -> None:
    one = 2 * math.log(3)  # at β = 1/2 the logit log 3, σ = 3/4
    # ascending: (0, 2·one) against (0, one); the rows of 2·one and 0 get the logits log 3 and 0
    got = loss(torch.tensor([2 * one, 0.0]), torch.tensor([0.0, one]), 0.5)
    assert got.tolist() == pytest.approx([0.28768207, 0.69314718])  # -log 3/4; log 2
    # ascending: (0, one) against (0, one), although as pairs they differ by one
    got = loss(torch.tensor([one, 0.0]), torch.tensor([0.0, one]), 0.5, 0.1)
    assert got.tolist() == pytest.approx([0.69314718, 0.69314718])


@both
def test_one_pair_is_dpo(loss: Loss) -> None:
    first, second = torch.tensor([1.7]), torch.tensor([-0.4])
    assert torch.equal(loss(first, second, 0.3, 0.1), sigmoid_loss(first - second, 0.3, 0.1))


@both
@settings(deadline=None)
@given(pairs=pairs_of_any_order, seed=st.integers(0, 99))
def test_order_of_neither_vector_matters(loss: Loss, pairs: list[tuple[float, float]], seed: int) -> None:
    first, second = columns(pairs)
    shuffled = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    plain = loss(first, second, 0.1)
    assert torch.equal(loss(first, second[shuffled], 0.1), plain)
    moved = loss(first[shuffled], second, 0.1)
    assert moved.sort().values.tolist() == pytest.approx(plain.sort().values.tolist(), rel=1e-12)
    if len(set(first.tolist())) == len(pairs):
        assert torch.equal(moved, plain[shuffled])


def test_identical_batches_in_any_order_give_log_two() -> None:
    values = torch.tensor([3.0, -1.0, 0.5])
    assert aot_paired_loss(values, values.flip(0), 0.5).tolist() == pytest.approx([math.log(2)] * 3)
    assert aot_unpaired_loss(values, values.flip(0), 0.5).tolist() == pytest.approx([math.log(2)] * 3)


def test_descent_raises_the_first_vector_and_lowers_its_partners() -> None:
    first, second = [0.0, 4.0, -3.0], [5.0, 1.0, -2.0]
    _, up, down = gradients(lambda c, r: aot_unpaired_loss(c, r, 0.5), first, second)
    assert (up < 0).all()
    assert (down > 0).all()
    # partners by rank: -3 with -2, 0 with 1, 4 with 5, so the same differences and gradients
    assert down.tolist() == pytest.approx([-up[1].item(), -up[0].item(), -up[2].item()])
    # in the paired variant the first vector is chosen minus rejected
    _, chosen, rejected = gradients(
        lambda c, r: aot_paired_loss(c - r, torch.zeros(3, dtype=torch.float64), 0.5), first, second
    )
    assert (chosen < 0).all()
    assert (rejected > 0).all()


def test_gradient_of_a_paired_loss_reaches_its_own_policy_margin_alone() -> None:
    margins = torch.tensor([2.0, -1.0, 0.0], requires_grad=True)
    losses = aot_paired_loss(margins, torch.tensor([0.0, 3.0, -1.0]), 0.5)
    for row in range(3):
        (gradient,) = torch.autograd.grad(losses[row], margins, retain_graph=True)
        assert (gradient != 0).tolist() == [other == row for other in range(3)]


@both
def test_losses_stay_finite_in_float32(loss: Loss) -> None:
    assert_finite_in_float32(lambda c, r: loss(c, r, 0.1), EXTREMES, EXTREMES[::-1])
    assert_finite_in_float32(lambda c, r: loss(c, r, 0.1, 0.1), EXTREMES, [0.0] * len(EXTREMES))


@both
def test_options_and_shapes_out_of_range_are_refused(loss: Loss) -> None:
    with pytest.raises(OptionError, match="beta"):
        loss(torch.zeros(2), torch.zeros(2), 0.0)
    with pytest.raises(OptionError, match="label_smoothing"):
        loss(torch.zeros(2), torch.zeros(2), 0.1, 0.6)
    with pytest.raises(TensorInputError, match=r"reference_margins|rejected_ratios"):
        loss(torch.zeros(2), torch.zeros(1), 0.1)
    assert loss(torch.zeros(0), torch.zeros(0), 0.1).tolist() == []
