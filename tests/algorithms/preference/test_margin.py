"""Promises of rlhf_ray.algorithms.preference.margin, against exact decimals."""

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
from rlhf_ray.algorithms.preference.margin import (
    discopop_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)

MARGINS = st.lists(LOG_PROB | st.floats(-5, 5), max_size=5)
# 0.4990234375 is 0.5 - 2^-10, so 1 - 2ε is exact
SMOOTHING = st.floats(0, 0.4990234375)
LOG3 = math.log(3)

# the loss of z = β·m, with its second option: as the paper prints it, and here
FORMULAS: dict[str, Callable[[Decimal, Decimal], Decimal]] = {
    "sigmoid": lambda z, e: -(1 - e) * sigma(z).ln() - e * sigma(-z).ln(),
    "robust": lambda z, e: (-(1 - e) * sigma(z).ln() + e * sigma(-z).ln()) / (1 - 2 * e),
    "hinge": lambda z, e: max(Decimal(0), 1 - z),
    "exo": lambda z, e: sigma(z) * (sigma(z) / (1 - e)).ln() + sigma(-z) * (sigma(-z) / e).ln(),
    "discopop": lambda z, t: (1 - sigma(z / t)) * -sigma(z).ln() + sigma(z / t) * (-z).exp(),
}
LOSSES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "sigmoid": lambda m, beta, e: sigmoid_loss(m, beta, e),
    "robust": lambda m, beta, e: robust_loss(m, beta, e),
    "hinge": lambda m, beta, e: hinge_loss(m, beta),
    "exo": lambda m, beta, e: exo_loss(m, beta, e),
    "discopop": lambda m, beta, t: discopop_loss(m, beta, t),
    "ipo": lambda m, beta, e: ipo_loss(m, beta),
    "simpo": lambda m, beta, e: simpo_loss(m, torch.zeros_like(m), beta, 0.0, e),
}


@pytest.mark.parametrize("name", FORMULAS)
@settings(deadline=None)
@given(margins=MARGINS, beta=BETA, smoothing=SMOOTHING, small=st.floats(0.05, 0.49))
def test_losses_equal_exact_formulas(
    name: str, margins: list[float], beta: float, smoothing: float, small: float
) -> None:
    option = small if name in ("exo", "discopop") else smoothing
    got = LOSSES[name](torch.tensor(margins, dtype=torch.float64), beta, option)
    want = [float(FORMULAS[name](Decimal(beta) * Decimal(m), Decimal(option))) for m in margins]
    assert got.tolist() == pytest.approx(want, rel=1e-9, abs=1e-11)


@settings(deadline=None)
@given(MARGINS, st.floats(0.01, 2))
def test_ipo_equals_an_exact_formula(margins: list[float], tau: float) -> None:
    want = [float((Decimal(m) - 1 / (2 * Decimal(tau))) ** 2) for m in margins]
    assert ipo_loss(torch.tensor(margins, dtype=torch.float64), tau).tolist() == pytest.approx(want, rel=1e-7, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(LOG_PROB, LOG_PROB), max_size=5), BETA, st.floats(0, 5), st.floats(0, 0.5))
def test_simpo_equals_an_exact_formula(
    pairs: list[tuple[float, float]], beta: float, gamma: float, smoothing: float
) -> None:
    want = []
    for chosen, rejected in pairs:
        z = Decimal(beta) * (Decimal(chosen) - Decimal(rejected)) - Decimal(gamma)
        want.append(float(FORMULAS["sigmoid"](z, Decimal(smoothing))))
    assert simpo_loss(*columns(pairs), beta, gamma, smoothing).tolist() == pytest.approx(want, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize(
    ("loss", "want"),
    [
        # β = 1/2 and m = 2·log 3, so z = log 3, σ(z) = 3/4, σ(-z) = 1/4;
        # -log σ(z) = 0.28768207, -log σ(-z) = 1.38629436
        (lambda m: sigmoid_loss(m, 0.5), 0.28768207),
        (lambda m: sigmoid_loss(-m, 0.5), 1.38629436),
        (lambda m: sigmoid_loss(m, 0.5, 0.1), 0.39754330),  # 0.9 · 0.28768207 + 0.1 · 1.38629436
        (lambda m: robust_loss(m, 0.5, 0.1), 0.15035554),  # (0.9 · 0.28768207 - 0.1 · 1.38629436) / 0.8
        (lambda m: exo_loss(m, 0.5, 0.25), 0.0),  # the policy has the smoothed preference
        (lambda m: exo_loss(m, 0.5, 0.1), 0.09233152),  # 3/4 · log(5/6) + 1/4 · log(5/2)
        (lambda m: discopop_loss(m, 0.5, 1.0), 0.32192052),  # s = 3/4: 1/4 · 0.28768207 + 3/4 · 1/3
        (lambda m: discopop_loss(m, 0.5, 0.5), 0.32876821),  # s = 9/10: 1/10 · 0.28768207 + 9/10 · 1/3
        (lambda m: discopop_loss(-m, 0.5, 0.5), 1.54766492),  # s = 1/10: 9/10 · 1.38629436 + 1/10 · 3
        (lambda m: simpo_loss(m - 4, m - 4, 2.0, LOG3), 1.38629436),  # equal means: z = -log 3
        (lambda m: simpo_loss(m - 4, m - 5, 2.0, 2 - LOG3), 0.28768207),  # z = 2 · 1 - (2 - log 3)
        (lambda m: simpo_loss(m - 4, m - 5, 2.0, 2 - LOG3, 0.1), 0.39754330),
    ],
)
def test_losses_have_hand_worked_values(loss: Callable[[Tensor], Tensor], want: float) -> None:
    assert loss(torch.tensor([2 * LOG3], dtype=torch.float64)).tolist() == pytest.approx([want], rel=1e-7, abs=1e-8)


def test_hinge_and_ipo_have_hand_worked_values() -> None:
    assert hinge_loss(torch.tensor([1.0, 3.0, -2.0]), 0.5).tolist() == [0.5, 0.0, 2.0]  # 1 - 1/2; below 0; 1 + 1
    assert ipo_loss(torch.tensor([3.0, 5.0, 8.0, 0.0]), 0.1).tolist() == [4.0, 0.0, 9.0, 25.0]  # target 1 / 0.2 = 5


def test_discopop_blends_by_a_temperature_of_a_twentieth() -> None:
    margins = torch.tensor([-0.1, 0.02])
    assert discopop_loss(margins, 1.0).tolist() == discopop_loss(margins, 1.0, 0.05).tolist()


@pytest.mark.parametrize(
    ("name", "option", "want"),
    [
        ("sigmoid", 0.0, 0.69314718),  # log 2
        ("sigmoid", 0.3, 0.69314718),
        ("robust", 0.3, 0.69314718),  # (0.7 - 0.3) · log 2 / 0.4
        ("hinge", 0.0, 1.0),
        ("exo", 0.2, 0.22314355),  # -log 2 - log(0.2 · 0.8) / 2
        ("discopop", 0.05, 0.84657359),  # (log 2 + 1) / 2
        ("simpo", 0.0, 0.69314718),
    ],
)
def test_no_margin_and_no_beta_give_the_same_constant(name: str, option: float, want: float) -> None:
    margins = torch.tensor([0.0], dtype=torch.float64)
    assert LOSSES[name](margins, 0.7, option).tolist() == pytest.approx([want])
    assert LOSSES[name](margins + 3.0, 1e-12, option).tolist() == pytest.approx([want])
    assert LOSSES[name](margins - 3.0, 1e-12, option).tolist() == pytest.approx([want])


def test_ipo_without_margin_is_the_squared_target() -> None:
    assert ipo_loss(torch.zeros(1), 0.25).tolist() == [4.0]  # 1 / (4 · 0.25²)


def test_without_smoothing_the_robust_loss_is_dpo() -> None:
    margins = torch.linspace(-30, 30, 61)
    assert torch.equal(robust_loss(margins, 0.3, 0.0), sigmoid_loss(margins, 0.3))


def test_robust_loss_of_labels_swapped_at_random_is_dpo_of_the_true_ones() -> None:
    margins = torch.linspace(-30, 30, 61, dtype=torch.float64)
    mean = 0.8 * robust_loss(margins, 0.3, 0.2) + 0.2 * robust_loss(-margins, 0.3, 0.2)
    assert torch.allclose(mean, sigmoid_loss(margins, 0.3), rtol=1e-12, atol=1e-12)


def test_smoothing_of_a_half_prefers_neither_answer() -> None:
    losses, slope = gradients(lambda m: sigmoid_loss(m, 0.7, 0.5), [-3.0, 0.0, 3.0])
    assert losses[0].item() == pytest.approx(losses[2].item())
    assert slope[1] == 0
    assert slope[0] == -slope[2] < 0


@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "simpo"])
def test_descent_raises_the_chosen_and_lowers_the_rejected(name: str) -> None:
    smoothing = 0.2 if name == "robust" else 0.0
    chosen, rejected = [0.0, -500.0, 3.0, -1.0, 400.0], [0.0, 500.0, -2.0, 1.0, -400.0]
    _, up, down = gradients(lambda c, r: LOSSES[name](c - r, 0.1, smoothing), chosen, rejected)
    assert (up <= 0).all()
    assert (down >= 0).all()
    assert (up[:4] < 0).all()
    assert (down[:4] > 0).all()


@pytest.mark.parametrize(
    ("loss", "turns"),
    [
        (lambda m: sigmoid_loss(m, 0.5, 0.25), [2 * LOG3]),  # σ(m / 2) = 3/4
        (lambda m: exo_loss(m, 0.5, 0.25), [2 * LOG3]),
        (lambda m: simpo_loss(m, torch.zeros_like(m), 0.5, 1.0, 0.25), [2 + 2 * LOG3]),
        (lambda m: ipo_loss(m, 0.1), [5.0]),
        (lambda m: discopop_loss(m, 1.0), [-0.119, 0.0724]),  # both flanks of the bump
    ],
)
def test_losses_fall_up_to_their_turning_points_only(loss: Callable[[Tensor], Tensor], turns: list[float]) -> None:
    near = 1e-3
    points = [point for turn in turns for point in (turn - near, turn + near)]
    _, slope = gradients(loss, points)
    assert slope.sign().tolist() == [-1.0, 1.0, 1.0, -1.0][: len(points)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("option", [1e-3, 0.05, 0.4])
def test_losses_stay_finite_in_float32(name: str, option: float) -> None:
    assert_finite_in_float32(lambda m: LOSSES[name](m, 0.1, option), EXTREMES)
    assert_finite_in_float32(lambda m: LOSSES[name](m, 1.0, option), EXTREMES)


@pytest.mark.parametrize("name", LOSSES)
def test_betas_and_shapes_out_of_range_are_refused(name: str) -> None:
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(OptionError, match=r"(beta|tau) is .* must be above 0 and finite"):
            LOSSES[name](torch.zeros(2), beta, 0.1)
    with pytest.raises(TensorInputError, match=r"margins|chosen_means"):
        LOSSES[name](torch.zeros(2, 2), 0.1, 0.1)
    assert LOSSES[name](torch.zeros(0), 0.1, 0.1).tolist() == []


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sigmoid", (-0.1, 0.6, math.nan), "label_smoothing is .* in .0, 0.5."),
        ("simpo", (-0.1, 0.6, math.nan), "label_smoothing is .* in .0, 0.5."),
        ("robust", (-0.1, 0.5, math.nan), "label_smoothing is .* in .0, 0.5."),
        ("exo", (0.0, 0.5, math.nan), "label_smoothing is .* in .0, 0.5."),
        ("discopop", (0.0, 1.1, math.nan), "tau is .* above 0 and at most 1"),
    ],
)
def test_second_options_out_of_range_are_refused(name: str, options: tuple[float, ...], expected: str) -> None:
    for option in options:
        with pytest.raises(OptionError, match=expected):
            LOSSES[name](torch.zeros(2), 0.1, option)


def test_simpo_refuses_a_negative_gamma_and_means_that_do_not_match() -> None:
    for gamma in (-0.1, math.nan, math.inf):
        with pytest.raises(OptionError, match="gamma"):
            simpo_loss(torch.zeros(2), torch.zeros(2), 2.0, gamma)
    with pytest.raises(TensorInputError, match="rejected_means"):
        simpo_loss(torch.zeros(2), torch.zeros(1), 2.0, 0.5)
