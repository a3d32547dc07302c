"""Promises of rlhf_ray.algorithms.policy_loss, against plain Python floats."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.errors import OptionError, TensorInputError
from rlhf_ray.algorithms.policy_loss import (
    PolicyLossInputs,
    PolicyLossOptions,
    PolicyLossOutput,
    clipped_policy_loss,
)

# new log-prob, old log-prob, advantage, entropy
tokens = st.lists(st.tuples(st.floats(-4, 0), st.floats(-4, 0), st.floats(-3, 3), st.floats(0, 5)), max_size=30)
dual_clips = st.none() | st.floats(1.01, 5)


def inputs_of(rows: list[tuple[float, float, float, float]]) -> PolicyLossInputs:
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    logprobs, entropy = table[:, 0].clone().requires_grad_(), table[:, 3].clone().requires_grad_()
    return PolicyLossInputs(logprobs, table[:, 1], table[:, 2], entropy)


def loss_at(ratio: float, advantage: float, entropy: float = 0.0, **options: Any) -> PolicyLossOutput:
    options = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": None, "entropy_coef": 0.0} | options
    return clipped_policy_loss(inputs_of([(math.log(ratio), 0.0, advantage, entropy)]), PolicyLossOptions(**options))


def gradient_at(ratio: float, advantage: float, dual_clip: float | None = None) -> float:
    """Of the loss, with respect to the log-prob."""
    inputs = inputs_of([(math.log(ratio), 0.0, advantage, 0.0)])
    out = clipped_policy_loss(
        inputs, PolicyLossOptions(clip_low=0.2, clip_high=0.3, dual_clip=dual_clip, entropy_coef=0.0)
    )
    out.loss.sum().backward()
    assert inputs.logprobs.grad is not None
    return float(inputs.logprobs.grad)


@settings(deadline=None)
@given(tokens, st.floats(0.01, 0.9), st.floats(0.01, 2), dual_clips, st.floats(0, 1))
def test_loss_equals_a_loop_in_float64(
    rows: list[tuple[float, float, float, float]],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
) -> None:
    out = clipped_policy_loss(
        inputs_of(rows),
        PolicyLossOptions(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, entropy_coef=entropy_coef),
    )
    losses, ratios, kls = [], [], []
    for new, old, advantage, entropy in rows:
        ratio = math.exp(new) / math.exp(old)
        inside = max(1 - clip_low, min(1 + clip_high, ratio))
        objective = min(ratio * advantage, inside * advantage)
        if dual_clip is not None and advantage < 0:
            objective = max(objective, dual_clip * advantage)
        losses.append(-objective - entropy_coef * entropy)
        ratios.append(ratio)
        kls.append((ratio - 1) - math.log(ratio))
    assert out.loss.tolist() == pytest.approx(losses, rel=1e-9, abs=1e-9)
    assert out.ratio.tolist() == pytest.approx(ratios, rel=1e-9)
    assert out.approx_kl.tolist() == pytest.approx(kls, rel=1e-6, abs=1e-9)


@settings(deadline=None)
@given(tokens, dual_clips)
def test_clipped_marks_exactly_the_tokens_without_policy_gradient(
    rows: list[tuple[float, float, float, float]], dual_clip: float | None
) -> None:
    # a product below 1e-300 is not a gradient either
    rows = [row for row in rows if abs(row[2]) > 1e-3]
    inputs = inputs_of(rows)
    out = clipped_policy_loss(
        inputs, PolicyLossOptions(clip_low=0.2, clip_high=0.3, dual_clip=dual_clip, entropy_coef=0.0)
    )
    (gradient,) = torch.autograd.grad(out.loss.sum(), inputs.logprobs)
    assert out.clipped.tolist() == (gradient == 0).double().tolist()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, 0.0),
        (1.2, 2.0, -2.4, 0.0),
        (2.0, 2.0, -2.6, 1.0),  # high clip: 1.3 · 2
        (0.5, 2.0, -1.0, 0.0),  # below the low clip, but a positive advantage is not held back
        (0.5, -2.0, 1.6, 1.0),  # low clip: 0.8 · -2
        (2.0, -2.0, 4.0, 0.0),  # above the high clip, but a negative advantage is not held back
        (2.0, 0.0, 0.0, 0.0),
    ],
)
def test_loss_and_clipped_have_hand_worked_values(ratio: float, advantage: float, loss: float, clipped: float) -> None:
    out = loss_at(ratio, advantage)
    assert out.loss.item() == pytest.approx(loss)
    assert out.clipped.item() == clipped


def test_low_and_high_clip_act_on_their_own_side() -> None:
    assert loss_at(3.0, 1.0, clip_low=0.1, clip_high=0.5).loss.item() == pytest.approx(-1.5)
    assert loss_at(0.1, -1.0, clip_low=0.1, clip_high=0.5).loss.item() == pytest.approx(0.9)


def test_ratios_just_inside_the_bounds_learn_and_just_outside_do_not() -> None:
    assert gradient_at(1.2999, 1.0) == pytest.approx(-1.2999)
    assert gradient_at(1.3001, 1.0) == 0
    assert gradient_at(0.8001, -1.0) == pytest.approx(0.8001)
    assert gradient_at(0.7999, -1.0) == 0


def test_descent_raises_good_tokens_and_lowers_bad_ones() -> None:
    assert gradient_at(1.0, 2.0) == pytest.approx(-2.0)
    assert gradient_at(1.0, -2.0) == pytest.approx(2.0)


def test_dual_clip_bounds_the_loss_of_bad_tokens_only() -> None:
    assert loss_at(50.0, -2.0, dual_clip=3.0).loss.item() == pytest.approx(6.0)
    assert loss_at(50.0, -2.0, dual_clip=3.0).clipped.item() == 1
    assert loss_at(2.9, -2.0, dual_clip=3.0).loss.item() == pytest.approx(5.8)
    assert loss_at(2.9, -2.0, dual_clip=3.0).clipped.item() == 0
    assert loss_at(50.0, 2.0, dual_clip=3.0).loss.item() == pytest.approx(-2.6)
    assert gradient_at(50.0, -2.0, dual_clip=3.0) == 0
    assert gradient_at(50.0, -2.0) == pytest.approx(100.0)


def test_entropy_bonus_is_subtracted_and_pushes_entropy_up() -> None:
    assert loss_at(1.0, 2.0, entropy=0.5, entropy_coef=0.1).loss.item() == pytest.approx(-2.05)
    inputs = inputs_of([(0.0, 0.0, 2.0, 0.5)])
    out = clipped_policy_loss(inputs, PolicyLossOptions(clip_low=0.2, clip_high=0.2, dual_clip=None, entropy_coef=0.1))
    out.loss.sum().backward()
    assert inputs.entropy.grad is not None
    assert inputs.entropy.grad.item() == pytest.approx(-0.1)


def test_entropy_is_outside_the_graph_without_a_bonus() -> None:
    inputs = inputs_of([(0.0, 0.0, 2.0, math.inf)])
    out = clipped_policy_loss(inputs, PolicyLossOptions(clip_low=0.2, clip_high=0.2, dual_clip=None, entropy_coef=0.0))
    out.loss.sum().backward()
    assert out.loss.item() == -2
    assert inputs.entropy.grad is None


def test_first_step_has_ratio_one_and_no_kl() -> None:
    logprobs = torch.linspace(-8, 0, 100)
    inputs = PolicyLossInputs(logprobs, logprobs.clone(), torch.linspace(-1, 1, 100), torch.zeros(100))
    out = clipped_policy_loss(inputs, PolicyLossOptions(clip_low=0.2, clip_high=0.2, dual_clip=3.0, entropy_coef=0.0))
    assert out.ratio.tolist() == [1.0] * 100
    assert out.approx_kl.tolist() == out.clipped.tolist() == [0.0] * 100


def test_gradients_reach_new_logprobs_only_and_the_reports_are_detached() -> None:
    old, advantages = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
    new = torch.zeros(1, requires_grad=True)
    inputs = PolicyLossInputs(new, old, advantages, torch.zeros(1))
    out = clipped_policy_loss(inputs, PolicyLossOptions(clip_low=0.2, clip_high=0.2, dual_clip=None, entropy_coef=0.1))
    out.loss.sum().backward()
    assert new.grad is not None
    assert old.grad is None
    assert advantages.grad is None
    assert not any(report.requires_grad for report in (out.clipped, out.ratio, out.approx_kl))


@pytest.mark.parametrize("name", ["old_logprobs", "advantages", "entropy"])
def test_shapes_that_would_broadcast_are_refused(name: str) -> None:
    shapes = {"logprobs": 3, "old_logprobs": 3, "advantages": 3, "entropy": 3} | {name: 1}
    inputs = PolicyLossInputs(**{key: torch.zeros(size) for key, size in shapes.items()})
    with pytest.raises(TensorInputError, match=f"tensor {name} has"):
        clipped_policy_loss(inputs, PolicyLossOptions(clip_low=0.2, clip_high=0.2, dual_clip=None, entropy_coef=0.0))


@pytest.mark.parametrize(
    ("name", "value"), [("clip_low", 1.1), ("clip_low", -0.1), ("clip_high", -0.1), ("dual_clip", 1.0)]
)
def test_bounds_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"{name} is {value}"):
        loss_at(1.0, 1.0, **{name: value})
