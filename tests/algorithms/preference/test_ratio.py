"""Promises of rlhf_ray.algorithms.preference.ratio, against exact decimals."""

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
from rlhf_ray.algorithms.preference.ratio import apo_down_loss, apo_zero_loss, nca_loss, sppo_loss

HALF, LOG3 = Decimal("0.5"), math.log(3)
RATIO = LOG_PROB | st.floats(-5, 5)
Loss = Callable[[Tensor, Tensor, float], Tensor]

FORMULAS: dict[Loss, Callable[[Decimal, Decimal, Decimal], Decimal]] = {
    nca_loss: lambda c, r, b: -sigma(b * c).ln() - HALF * sigma(-b * c).ln() - HALF * sigma(-b * r).ln(),
    sppo_loss: lambda c, r, b: (c - 1 / b * (1 - HALF)) ** 2 + (r - 1 / b * (0 - HALF)) ** 2,
    apo_zero_loss: lambda c, r, b: 1 - sigma(b * c) + sigma(b * r),
    apo_down_loss: lambda c, r, b: sigma(b * c) + 1 - sigma(b * c - b * r),
}
everywhere = pytest.mark.parametrize("loss", FORMULAS)


@everywhere
@settings(deadline=None)
@given(pairs=st.lists(st.tuples(RATIO, RATIO), max_size=5), beta=BETA)
def test_losses_equal_exact_formulas(loss: Loss, pairs: list[tuple[float, float]], beta: float) -> None:
    want = [float(FORMULAS[loss](Decimal(c), Decimal(r), Decimal(beta))) for c, r in pairs]
    assert loss(*columns(pairs), beta).tolist() == pytest.approx(want, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize(
    ("loss", "chosen", "rejected", "want"),
    [
        # β = 1/2: a log-ratio of 2·log 3 has the reward log 3, σ = 3/4; -2·log 3 has σ = 1/4
        (nca_loss, 2 * LOG3, 0.0, 1.32740284),  # -log 3/4 - 1/2 · log 1/4 - 1/2 · log 1/2
        (nca_loss, 0.0, 2 * LOG3, 1.73286795),  # -log 1/2 - 1/2 · log 1/2 - 1/2 · log 1/4 = 5/2 · log 2
        (sppo_loss, 3.0, -2.0, 5.0),  # targets 1 and -1: 2² + 1²
        (sppo_loss, 1.0, 1.0, 4.0),  # 0² + 2²
        (apo_zero_loss, 2 * LOG3, 0.0, 0.75),  # 1/4 + 1/2
        (apo_zero_loss, 0.0, -2 * LOG3, 0.75),  # 1/2 + 1/4
        (apo_zero_loss, -2 * LOG3, 2 * LOG3, 1.5),  # 3/4 + 3/4
        (apo_down_loss, 2 * LOG3, 0.0, 1.0),  # 3/4 + 1/4
        (apo_down_loss, 0.0, -2 * LOG3, 0.75),  # 1/2 + 1/4
        (apo_down_loss, -2 * LOG3, -2 * LOG3, 0.75),  # 1/4 + 1/2
    ],
)
def test_losses_have_hand_worked_values(loss: Loss, chosen: float, rejected: float, want: float) -> None:
    assert loss(*columns([(chosen, rejected)]), 0.5).tolist() == pytest.approx([want])


@pytest.mark.parametrize(
    ("loss", "want"), [(nca_loss, 1.38629436), (apo_zero_loss, 1.0), (apo_down_loss, 1.0)]
)  # 2 · log 2; 1/2 + 1/2
def test_a_policy_like_its_reference_and_no_beta_give_the_same_constant(loss: Loss, want: float) -> None:
    assert loss(*columns([(0.0, 0.0)]), 0.7).tolist() == pytest.approx([want])
    assert loss(*columns([(3.0, -4.0), (-4.0, 3.0)]), 1e-12).tolist() == pytest.approx([want, want])


def test_sppo_of_a_policy_like_its_reference_is_both_squared_targets() -> None:
    assert sppo_loss(torch.zeros(1), torch.zeros(1), 0.25).tolist() == [8.0]  # 2² + 2²


def test_apo_zero_of_equal_ratios_is_one() -> None:
    ratios = torch.linspace(-9, 9, 19, dtype=torch.float64)
    assert apo_zero_loss(ratios, ratios, 0.5).tolist() == pytest.approx([1.0] * 19)


@pytest.mark.parametrize(
    ("loss", "chosen", "rejected"),
    [
        # β = 1/2 and σ(0) = 1/2, σ'(0) = 1/4
        (nca_loss, -0.125, 0.125),  # 1/2 · (-1/2 + 1/2 · 1/2); 1/2 · 1/2 · 1/2
        (sppo_loss, -2.0, 2.0),  # 2 · (0 - 1); 2 · (0 + 1)
        (apo_zero_loss, -0.125, 0.125),  # -1/2 · 1/4; 1/2 · 1/4
        (apo_down_loss, 0.0, 0.125),  # 1/2 · (1/4 - 1/4); 1/2 · 1/4
    ],
)
def test_gradients_at_the_reference_have_hand_worked_values(loss: Loss, chosen: float, rejected: float) -> None:
    _, up, down = gradients(lambda c, r: loss(c, r, 0.5), [0.0], [0.0])
    assert (up.item(), down.item()) == (chosen, rejected)


@pytest.mark.parametrize(
    ("loss", "chosen", "rejected", "signs"),
    [
        # rewards of the chosen below, at and above log 2 = 0.693; the rejected one is lowered everywhere
        (nca_loss, [1.38, 1.39, -50.0, 50.0], [-9.0, 9.0, 0.0, 0.0], ([-1, 1, -1, 1], [1, 1, 1, 1])),
        # targets 1 and -1
        (sppo_loss, [0.9, 1.1, 5.0, -5.0], [-0.9, -1.1, 0.0, -5.0], ([-1, 1, 1, -1], [1, -1, 1, -1])),
        (apo_zero_loss, [-20.0, 0.0, 20.0, 1.0], [20.0, 0.0, -20.0, 3.0], ([-1, -1, -1, -1], [1, 1, 1, 1])),
        # the chosen is lowered where |c| < |c - r|: 1 < 3, not 3 < 1, 2 < 5, not 5 < 2
        (apo_down_loss, [1.0, 3.0, -2.0, -5.0], [4.0, 2.0, 3.0, -7.0], ([1, -1, 1, -1], [1, 1, 1, 1])),
    ],
)
def test_gradients_have_the_signs_that_the_docstrings_say(
    loss: Loss, chosen: list[float], rejected: list[float], signs: tuple[list[int], list[int]]
) -> None:
    _, up, down = gradients(lambda c, r: loss(c, r, 0.5), chosen, rejected)
    assert (up.sign().tolist(), down.sign().tolist()) == signs


@everywhere
def test_losses_stay_finite_in_float32(loss: Loss) -> None:
    for chosen in (EXTREMES, [0.0] * len(EXTREMES)):
        for rejected in (EXTREMES, EXTREMES[::-1], [0.0] * len(EXTREMES)):
            assert_finite_in_float32(lambda c, r: loss(c, r, 0.1), chosen, rejected)


@everywhere
def test_betas_and_shapes_out_of_range_are_refused(loss: Loss) -> None:
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(OptionError, match="beta"):
            loss(torch.zeros(2), torch.zeros(2), beta)
    with pytest.raises(TensorInputError, match="rejected_ratios"):
        loss(torch.zeros(2), torch.zeros(1), 0.1)
    assert loss(torch.zeros(0), torch.zeros(0), 0.1).tolist() == []
