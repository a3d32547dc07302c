"""Promises of rlhf_ray.algorithms.moments, against plain Python floats."""

import json
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.errors import AlgorithmInputError, OptionError
from rlhf_ray.algorithms.moments import Moments, whiten

values = st.lists(st.floats(-100, 100), min_size=1, max_size=40)
shards = st.lists(st.lists(st.floats(-100, 100), max_size=12), min_size=1, max_size=6).filter(any)


def tensor(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def merged(parts: list[list[float]]) -> Moments:
    total = Moments()
    for part in parts:
        total = total.merge(Moments.of(tensor(part)))
    return total


@settings(deadline=None)
@given(values)
def test_moments_equal_the_statistics_module(numbers: list[float]) -> None:
    moments = Moments.of(tensor(numbers))
    assert moments.count == len(numbers)
    assert moments.mean == pytest.approx(statistics.fmean(numbers), abs=1e-9)
    assert moments.variance == pytest.approx(statistics.pvariance(numbers), rel=1e-9, abs=1e-9)
    assert moments.std == pytest.approx(statistics.pstdev(numbers), rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(shards)
def test_merged_moments_are_those_of_the_whole(parts: list[list[float]]) -> None:
    whole = Moments.of(tensor([x for part in parts for x in part]))
    total = merged(parts)
    assert total.count == whole.count
    assert total.mean == pytest.approx(whole.mean, abs=1e-9)
    assert total.m2 == pytest.approx(whole.m2, rel=1e-9, abs=1e-8)


def test_moments_give_hand_worked_values() -> None:
    assert Moments.of(torch.tensor([[1.0, 2.0], [3.0, 6.0]])) == Moments(count=4.0, mean=3.0, m2=14.0)
    assert Moments(1.0, 1.0, 0.0).merge(Moments(1.0, 3.0, 0.0)) == Moments(2.0, 2.0, 2.0)


def test_moments_of_nothing_change_nothing_and_have_no_variance() -> None:
    empty, some = Moments.of(torch.zeros(0)), Moments.of(torch.tensor([1.0, 2.0]))
    assert empty == Moments()
    assert empty.merge(some) == some.merge(empty) == some
    with pytest.raises(AlgorithmInputError, match="no variance"):
        _ = empty.variance


def test_float32_with_a_large_mean_loses_no_variance() -> None:
    numbers = 10_000 + torch.linspace(-1, 1, 1001)
    assert Moments.of(numbers).variance == pytest.approx(statistics.pvariance(numbers.tolist()), rel=1e-10)


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.integers(1, 50), st.integers(1, 50))
def test_equal_values_have_a_variance_of_exactly_zero(value: float, first: int, second: int) -> None:
    assert merged([[value] * first, [value] * second]).m2 == 0


def test_moments_survive_json_exactly() -> None:
    moments = Moments.of(tensor([0.1, math.pi, -7e-5]))
    assert Moments.from_state(json.loads(json.dumps(moments.state_dict()))) == moments


@settings(deadline=None)
@given(values, st.booleans())
def test_whitening_equals_a_loop_in_float64(numbers: list[float], shift_mean: bool) -> None:
    mean = sum(numbers) / len(numbers)
    variance = sum((x - mean) ** 2 for x in numbers) / len(numbers)
    want = [(x - mean) / math.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean) for x in numbers]
    got = whiten(tensor(numbers), Moments.of(tensor(numbers)), shift_mean)
    assert got.tolist() == pytest.approx(want, rel=1e-7, abs=1e-7)


@settings(deadline=None)
@given(shards, st.booleans())
def test_whitening_shards_is_whitening_the_whole(parts: list[list[float]], shift_mean: bool) -> None:
    flat = tensor([x for part in parts for x in part])
    whole = whiten(flat, Moments.of(flat), shift_mean)
    total = merged(parts)
    sharded = torch.cat([whiten(tensor(part), total, shift_mean) for part in parts])
    assert sharded.tolist() == pytest.approx(whole.tolist(), rel=1e-7, abs=1e-7)


def test_whitened_values_have_mean_zero_or_their_own_and_unit_variance() -> None:
    x = tensor([1.0, 2.0, 3.0, 6.0])
    shifted, kept = whiten(x, Moments.of(x)), whiten(x, Moments.of(x), shift_mean=False)
    assert (shifted.mean().item(), shifted.var(correction=0).item()) == pytest.approx((0.0, 1.0))
    assert (kept.mean().item(), kept.var(correction=0).item()) == pytest.approx((3.0, 1.0))


def test_whitening_keeps_dtype_and_turns_equal_values_into_zero() -> None:
    x = torch.full((7,), 0.1)
    whitened = whiten(x, Moments.of(x))
    assert whitened.dtype == torch.float32
    assert whitened.tolist() == [0.0] * 7


def test_whitening_refuses_moments_of_nothing_and_an_eps_of_zero() -> None:
    with pytest.raises(AlgorithmInputError, match="no variance"):
        whiten(torch.ones(2), Moments())
    with pytest.raises(OptionError, match="eps"):
        whiten(torch.ones(2), Moments.of(torch.ones(2)), eps=0.0)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(0, 6)), max_size=30))
def test_weighted_moments_are_those_of_the_numbers_repeated(numbers: list[tuple[float, int]]) -> None:
    values = torch.tensor([value for value, _ in numbers], dtype=torch.float64)
    counts = torch.tensor([count for _, count in numbers], dtype=torch.int64)
    found, expected = Moments.weighted(values, counts), Moments.of(values.repeat_interleave(counts))
    assert found.count == expected.count
    assert (found.mean, found.m2) == pytest.approx((expected.mean, expected.m2), rel=1e-9, abs=1e-6)
