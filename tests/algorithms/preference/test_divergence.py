"""Promises of rlhf_ray.algorithms.preference.divergence, against exact decimals."""

import math
from decimal import Decimal
from typing import Any, get_args

import pytest
import torch
from decimals import EXTREMES, LOG_PROB, assert_finite_in_float32, gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.errors import OptionError, TensorInputError
from rlhf_ray.algorithms.preference.divergence import Divergence, ratio_scores
from rlhf_ray.algorithms.preference.margin import sigmoid_loss

DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)


def derivative(log_ratio: float, divergence: str, alpha: float) -> Decimal:
    """f'(u) as printed, powers of 1/u bounded by e^30."""
    u, a = Decimal(log_ratio).exp(), Decimal(alpha)
    bound = Decimal(30).exp()
    values = {
        "reverse_kl": u.ln(),
        "forward_kl": -min(1 / u, bound),
        "js": (2 * u / (1 + u)).ln(),
        "alpha": (1 - min(u**-a, bound)) / a,
    }
    return values[divergence]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@settings(deadline=None)
@given(log_ratios=st.lists(LOG_PROB | st.floats(-40, 40), max_size=5), alpha=st.floats(0.01, 1))
def test_scores_equal_exact_derivatives(divergence: Divergence, log_ratios: list[float], alpha: float) -> None:
    want = [float(derivative(x, divergence, alpha)) for x in log_ratios]
    got = ratio_scores(torch.tensor(log_ratios, dtype=torch.float64), divergence, alpha)
    assert got.tolist() == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("divergence", "twice", "quarter"),
    [
        ("reverse_kl", 0.69314718, -1.38629436),  # log 2; log 1/4
        ("forward_kl", -0.5, -4.0),  # -1/2; -4
        ("js", 0.28768207, -0.91629073),  # log(4 / 3); log(0.5 / 1.25)
        ("alpha", 0.58578644, -2.0),  # (1 - 1/√2) / 0.5; (1 - 2) / 0.5
    ],
)
def test_scores_have_hand_worked_values(divergence: Divergence, twice: float, quarter: float) -> None:
    scores = ratio_scores(torch.tensor([2.0, 0.25]).log(), divergence, 0.5)
    assert scores.tolist() == pytest.approx([twice, quarter], rel=1e-6)


def test_small_alpha_is_the_reverse_kl_and_alpha_one_the_forward_kl_plus_one() -> None:
    log_ratios = torch.linspace(-20, 20, 81, dtype=torch.float64)
    reverse, forward = (ratio_scores(log_ratios, kind, 0.5) for kind in ("reverse_kl", "forward_kl"))
    assert torch.allclose(ratio_scores(log_ratios, "alpha", 1e-12), reverse, rtol=1e-9, atol=0)
    assert torch.allclose(ratio_scores(log_ratios, "alpha", 1.0), forward + 1, rtol=1e-12, atol=1e-12)


def test_js_approaches_the_reverse_kl_below_and_a_constant_above() -> None:
    scores = ratio_scores(torch.tensor([-1e3, 1e3]), "js", 0.5)
    assert scores.tolist() == pytest.approx([math.log(2) - 1e3, math.log(2)])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_scores_rise_with_the_ratio_and_stay_finite(divergence: Divergence) -> None:
    def score(log_ratios: torch.Tensor) -> torch.Tensor:
        return ratio_scores(log_ratios, divergence, 0.5)

    assert_finite_in_float32(score, EXTREMES)
    _, slope = gradients(score, [-29.0, -3.0, 0.0, 3.0, 29.0])
    assert (slope > 0).all()


@pytest.mark.parametrize(("divergence", "edge"), [("forward_kl", -30.0), ("alpha", -60.0)])
def test_scores_are_constant_only_below_the_named_bound(divergence: Divergence, edge: float) -> None:
    scores, slope = gradients(lambda x: ratio_scores(x, divergence, 0.5), [edge - 1e3, edge - 0.1, edge + 0.1])
    assert scores[0] == scores[1] < scores[2]
    assert (slope != 0).tolist() == [False, False, True]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_descent_on_f_dpo_raises_the_chosen_and_lowers_the_rejected(divergence: Divergence) -> None:
    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        margins = ratio_scores(chosen, divergence, 0.5) - ratio_scores(rejected, divergence, 0.5)
        return sigmoid_loss(margins, 0.1)

    losses, chosen, rejected = gradients(loss, [0.0, -2.0, 5.0], [0.0, 3.0, -1.0])
    assert losses[0].item() == pytest.approx(math.log(2))
    assert (chosen < 0).all()
    assert (rejected > 0).all()
    assert_finite_in_float32(loss, EXTREMES, EXTREMES[::-1])


def test_unknown_divergences_and_alphas_out_of_range_are_refused() -> None:
    unknown: Any = "hellinger"
    with pytest.raises(OptionError, match="one of reverse_kl, forward_kl, js, alpha"):
        ratio_scores(torch.zeros(2), unknown, 0.5)
    for alpha in (0.0, 1.1, math.nan):
        with pytest.raises(OptionError, match="alpha"):
            ratio_scores(torch.zeros(2), "alpha", alpha)
        assert ratio_scores(torch.zeros(2), "js", alpha).tolist() == pytest.approx([0.0, 0.0])
    with pytest.raises(TensorInputError, match="log_ratios"):
        ratio_scores(torch.zeros(2, 2), "js", 0.5)
