"""Promises of rlhf_ray.algorithms.value_loss, against plain Python floats."""

import statistics
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.errors import AlgorithmInputError, OptionError, TensorInputError
from rlhf_ray.algorithms.value_loss import ExplainedVariance, clipped_value_loss

number = st.floats(-10, 10)
tokens = st.lists(st.tuples(number, number, number), max_size=30)  # value, old value, return
pairs = st.lists(st.tuples(number, number), min_size=1, max_size=20)  # value, return


def columns(rows: Sequence[tuple[float, ...]], width: int) -> list[torch.Tensor]:
    return list(torch.tensor(rows, dtype=torch.float64).reshape(-1, width).unbind(1))


def explained(rows: Sequence[tuple[float, float]]) -> ExplainedVariance:
    values, returns = columns(rows, 2)
    return ExplainedVariance.of(values, returns)


@settings(deadline=None)
@given(tokens, st.none() | st.floats(0.01, 5))
def test_loss_equals_a_loop_in_float64(rows: list[tuple[float, float, float]], clip: float | None) -> None:
    values, old_values, returns = columns(rows, 3)
    out = clipped_value_loss(values, old_values, returns, clip)
    losses, clipped = [], []
    for value, old, target in rows:
        plain = (value - target) ** 2
        moved = value if clip is None else min(max(value, old - clip), old + clip)
        losses.append(0.5 * max(plain, (moved - target) ** 2))
        clipped.append(float((moved - target) ** 2 > plain))
    assert out.loss.tolist() == pytest.approx(losses, rel=1e-12, abs=1e-12)
    assert out.clipped.tolist() == clipped


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient", "clipped"),
    [
        (1.25, 1.0, 3.0, 1.53125, -1.75, 0.0),  # inside the clip
        (2.0, 1.0, 3.0, 1.125, 0.0, 1.0),  # moved further towards the return than allowed: 1.5 counts
        (2.0, 1.0, 0.0, 2.0, 2.0, 0.0),  # moved away from the return: the true error counts
        (-1.0, 0.0, -3.0, 3.125, 0.0, 1.0),  # the same downwards: -0.5 counts
    ],
)
def test_loss_gradient_and_clipped_have_hand_worked_values(
    value: float, old: float, target: float, loss: float, gradient: float, clipped: float
) -> None:
    values = torch.tensor([value], requires_grad=True)
    out = clipped_value_loss(values, torch.tensor([old]), torch.tensor([target]), 0.5)
    out.loss.sum().backward()
    assert values.grad is not None
    assert (out.loss.item(), values.grad.item(), out.clipped.item()) == (loss, gradient, clipped)


def test_without_clip_only_the_error_counts() -> None:
    values = torch.tensor([2.0], requires_grad=True)
    out = clipped_value_loss(values, torch.tensor([1.0]), torch.tensor([5.0]), None)
    out.loss.sum().backward()
    assert values.grad is not None
    assert (out.loss.item(), values.grad.item(), out.clipped.item()) == (4.5, -3.0, 0.0)


@settings(deadline=None)
@given(tokens, st.floats(0.01, 5))
def test_clipped_marks_exactly_the_tokens_without_gradient(rows: list[tuple[float, ...]], clip: float) -> None:
    rows = [row for row in rows if abs(row[0] - row[2]) > 1e-3]
    values, old_values, returns = columns(rows, 3)
    values.requires_grad_()
    out = clipped_value_loss(values, old_values, returns, clip)
    (gradient,) = torch.autograd.grad(out.loss.sum(), values)
    assert out.clipped.tolist() == (gradient == 0).double().tolist()


def test_values_inside_the_clip_are_never_marked_by_rounding() -> None:
    torch.manual_seed(0)
    old, values, returns = 1 + torch.rand(1000), 0.001 * torch.randn(1000), 0.001 * torch.randn(1000)
    assert clipped_value_loss(values, old, returns, 3.0).clipped.sum() == 0


def test_gradients_reach_values_only() -> None:
    values, old, returns = (torch.tensor([x], requires_grad=True) for x in (1.0, 0.9, 3.0))
    out = clipped_value_loss(values, old, returns, 0.2)
    out.loss.sum().backward()
    assert values.grad is not None
    assert old.grad is None
    assert returns.grad is None
    assert not out.clipped.requires_grad


def test_value_loss_refuses_shapes_that_would_broadcast_and_a_clip_of_zero() -> None:
    with pytest.raises(TensorInputError, match="returns"):
        clipped_value_loss(torch.zeros(2), torch.zeros(2), torch.zeros(1), None)
    with pytest.raises(OptionError, match="clip is 0"):
        clipped_value_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), 0.0)


@settings(deadline=None)
@given(pairs)
def test_explained_variance_equals_the_statistics_module(rows: list[tuple[float, float]]) -> None:
    got = explained(rows).value
    spread = statistics.pvariance([r for _, r in rows])
    if spread > 1e-6:
        assert got == pytest.approx(1 - statistics.pvariance([r - v for v, r in rows]) / spread, rel=1e-6, abs=1e-6)


@settings(deadline=None)
@given(pairs, pairs)
def test_explained_variance_of_shards_is_that_of_the_whole(
    first: list[tuple[float, float]], second: list[tuple[float, float]]
) -> None:
    whole = explained(first + second)
    merged = explained(first).merge(explained(second))
    if whole.returns.variance > 1e-6:
        assert merged.value == pytest.approx(whole.value, rel=1e-6, abs=1e-6)


def test_explained_variance_is_one_when_perfect_zero_when_constant_and_negative_when_worse() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert ExplainedVariance.of(returns, returns).value == 1
    assert ExplainedVariance.of(returns - 7, returns).value == 1
    assert ExplainedVariance.of(torch.full((3,), 9.0), returns).value == 0
    assert ExplainedVariance.of(-returns, returns).value == -3


def test_explained_variance_of_constant_returns_is_finite() -> None:
    constant = torch.full((3,), 0.1)
    assert ExplainedVariance.of(torch.zeros(3), constant).value == 1
    assert ExplainedVariance.of(torch.tensor([0.0, 1.0, 2.0]), constant).value == 0


def test_explained_variance_of_nothing_is_an_error() -> None:
    with pytest.raises(AlgorithmInputError, match="no variance"):
        _ = ExplainedVariance().value
