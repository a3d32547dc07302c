"""Promises of rlhf_ray.algorithms.preference.unpaired, against exact decimals."""

import json
import math
from decimal import Decimal

import pytest
import torch
from decimals import BETA, EXTREMES, LOG_PROB, assert_finite_in_float32, gradients, sigma
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.errors import OptionError, TensorInputError
from rlhf_ray.algorithms.preference.unpaired import RewardShift, bco_loss, kto_kl, kto_loss

ROWS = st.lists(st.tuples(LOG_PROB | st.floats(-5, 5), st.booleans()), max_size=6)
LOG3 = math.log(3)
REWARDS = st.lists(st.tuples(st.floats(-100, 100), st.booleans()), max_size=20)


def tensors(rows: list[tuple[float, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([r for r, _ in rows], dtype=torch.float64), torch.tensor([d for _, d in rows], dtype=torch.bool)


def take_in(shift: RewardShift, rows: list[tuple[float, bool]]) -> RewardShift:
    good, bad = [r for r, desirable in rows if desirable], [r for r, desirable in rows if not desirable]
    shift.update(sum(good), len(good), sum(bad), len(bad))
    return shift


@settings(deadline=None)
@given(ROWS, st.floats(0, 100), BETA, st.floats(0, 3), st.floats(0, 3))
def test_kto_equals_an_exact_formula(
    rows: list[tuple[float, bool]], kl: float, beta: float, good: float, bad: float
) -> None:
    want = []
    for log_ratio, desirable in rows:
        z = Decimal(beta) * (Decimal(log_ratio) - Decimal(kl))
        weight, value = (Decimal(good), sigma(z)) if desirable else (Decimal(bad), sigma(-z))
        want.append(float(weight - weight * value))  # λ_y - v(x, y)
    assert kto_loss(*tensors(rows), kl, beta, good, bad).tolist() == pytest.approx(want, rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(ROWS, st.floats(-100, 100), BETA)
def test_bco_equals_an_exact_formula(rows: list[tuple[float, bool]], shift: float, beta: float) -> None:
    want = []
    for log_ratio, desirable in rows:
        logit = Decimal(beta) * Decimal(log_ratio) - Decimal(shift)
        want.append(float(-sigma(logit if desirable else -logit).ln()))
    assert bco_loss(*tensors(rows), shift, beta).tolist() == pytest.approx(want, rel=1e-9, abs=1e-11)


def test_losses_have_hand_worked_values() -> None:
    # β · (log-ratio - kl) = 1/2 · 2·log 3: σ = 3/4, so 2 · (1 - 3/4) and 3 · (1 - 1/4)
    rows = tensors([(1 + 2 * LOG3, True), (1 + 2 * LOG3, False)])
    assert kto_loss(*rows, 1.0, 0.5, 2.0, 3.0).tolist() == pytest.approx([0.5, 2.25])
    assert kto_loss(*rows, 1.0, 0.5).tolist() == pytest.approx([0.25, 0.75])
    # β · log-ratio - δ = log 3: -log 3/4 and -log 1/4
    rows = tensors([(2 + 2 * LOG3, True), (2 + 2 * LOG3, False)])
    assert bco_loss(*rows, 1.0, 0.5).tolist() == pytest.approx([0.28768207, 1.38629436])


def test_at_the_reference_point_and_without_beta_kto_is_half_the_weight_and_bco_log_two() -> None:
    rows = tensors([(0.5, True), (0.5, False)])
    assert kto_loss(*rows, 0.5, 0.3, 1.0, 4.0).tolist() == pytest.approx([0.5, 2.0])
    assert kto_loss(*rows, 7.0, 1e-12, 1.0, 4.0).tolist() == pytest.approx([0.5, 2.0])
    assert bco_loss(*rows, 0.15, 0.3).tolist() == pytest.approx([math.log(2)] * 2)
    assert bco_loss(*rows, 0.0, 1e-12).tolist() == pytest.approx([math.log(2)] * 2)


def test_descent_raises_desirable_and_lowers_undesirable_answers() -> None:
    desirable = torch.tensor([True, False] * 3)
    log_ratios = [0.0, 0.0, -9.0, 9.0, 9.0, -9.0]
    for loss in (lambda r: kto_loss(r, desirable, 1.0, 0.5), lambda r: bco_loss(r, desirable, 1.0, 0.5)):
        _, slope = gradients(loss, log_ratios)
        assert slope.sign().tolist() == [-1.0, 1.0] * 3


def test_saturated_kto_losses_keep_their_digits_in_float32() -> None:
    # 1 - σ(20) = 2.06e-9 is below the rounding of 1, but not below that of float32
    loss = kto_loss(torch.tensor([20.0, -20.0]), torch.tensor([True, False]), 0.0, 1.0)
    assert loss.tolist() == pytest.approx([2.0611537e-9] * 2, rel=1e-5)


@pytest.mark.parametrize("kind", [True, False])
def test_losses_stay_finite_in_float32(kind: bool) -> None:
    desirable = torch.full((len(EXTREMES),), kind)
    assert_finite_in_float32(lambda r: kto_loss(r, desirable, 1e4, 0.1), EXTREMES)
    assert_finite_in_float32(lambda r: bco_loss(r, desirable, -1e4, 0.1), EXTREMES)


def test_kl_estimate_is_the_mean_and_at_least_zero() -> None:
    assert (kto_kl(6.0, 4.0), kto_kl(-6.0, 4.0), kto_kl(0.0, 4.0)) == (1.5, 0.0, 0.0)
    assert math.isnan(kto_kl(math.nan, 4.0))
    with pytest.raises(OptionError, match="rows is 0"):
        kto_kl(0.0, 0)


def test_wrong_inputs_are_refused() -> None:
    ratios, desirable = torch.zeros(2), torch.tensor([True, False])
    for kl in (-0.1, math.nan, math.inf):
        with pytest.raises(OptionError, match="kl is .* as kto_kl gives it"):
            kto_loss(ratios, desirable, kl, 0.1)
    for shift in (math.nan, math.inf):
        with pytest.raises(OptionError, match="shift"):
            bco_loss(ratios, desirable, shift, 0.1)
    for beta in (0.0, math.nan):
        with pytest.raises(OptionError, match="beta"):
            kto_loss(ratios, desirable, 0.0, beta)
        with pytest.raises(OptionError, match="beta"):
            bco_loss(ratios, desirable, 0.0, beta)
    with pytest.raises(OptionError, match="undesirable_weight is -1"):
        kto_loss(ratios, desirable, 0.0, 0.1, 1.0, -1.0)
    with pytest.raises(OptionError, match="desirable_weight is nan"):
        kto_loss(ratios, desirable, 0.0, 0.1, math.nan)
    for wrong in (desirable[:1], desirable.float()):
        with pytest.raises(TensorInputError, match="desirable"):
            kto_loss(ratios, wrong, 0.0, 0.1)
        with pytest.raises(TensorInputError, match="desirable"):
            bco_loss(ratios, wrong, 0.0, 0.1)


def test_shift_has_hand_worked_values() -> None:
    shift = RewardShift()
    assert shift.value == 0
    shift.update(9.0, 3, 0.0, 0)  # mean 3 of one kind only: half of it
    assert shift.value == 1.5
    shift.update(0.0, 0, -1.0, 2)  # (3 - 1/2) / 2
    assert shift.value == 1.25
    shift.update(3.0, 1, -5.0, 1)  # (12/4 - 6/3) / 2
    assert shift.value == 0.5


@settings(deadline=None)
@given(st.lists(REWARDS, max_size=6), st.integers(0, 6))
def test_shift_is_that_of_all_rows_however_they_are_split_and_across_a_restart(
    parts: list[list[tuple[float, bool]]], restart: int
) -> None:
    split = RewardShift()
    for number, part in enumerate(parts):
        if number == restart:
            state = json.loads(json.dumps(split.state_dict()))
            split = RewardShift()
            split.load_state_dict(state)
        take_in(split, part)
    rows = [row for part in parts for row in part]
    means = []
    for kind in (True, False):
        rewards = [reward for reward, desirable in rows if desirable == kind]
        means.append(math.fsum(rewards) / len(rewards) if rewards else 0.0)
    assert split.value == pytest.approx(sum(means) / 2, rel=1e-9, abs=1e-9)
    assert split.value == pytest.approx(take_in(RewardShift(), rows).value, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ((math.nan, 1, 0.0, 0), "desirable_sum is nan, but must be finite"),
        ((0.0, 0, math.inf, 1), "undesirable_sum is inf, but must be finite"),
        ((0.0, -1, 0.0, 0), "desirable_count is -1"),
        ((1.0, 1, 2.0, 0), "undesirable_sum is 2.0, but must be 0, because undesirable_count is 0"),
    ],
)
def test_shift_refuses_impossible_sums_and_stays_as_it_was(
    update: tuple[float, float, float, float], message: str
) -> None:
    shift = RewardShift()
    shift.update(2.0, 1, 4.0, 1)
    with pytest.raises(OptionError, match=message):
        shift.update(*update)
    assert shift.value == 3
