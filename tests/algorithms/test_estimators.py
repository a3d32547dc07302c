"""Advantages of whole samples, against loops over groups in float64."""

import math
from statistics import mean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.algorithms.errors import TensorInputError
from rlhf_ray.algorithms.estimators import (
    SampleInputs,
    TokenInputs,
    gae_of_tokens,
    groups_of,
    grpo,
    rloo,
    spread_fraction,
)

RETURNS = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))
SAMPLES = st.lists(st.tuples(st.integers(0, 5), RETURNS), min_size=1, max_size=40)


def inputs_of(samples: list[tuple[int, float]]) -> tuple[SampleInputs, dict[int, list[float]]]:
    groups: dict[int, list[float]] = {}
    for group, value in samples:
        groups.setdefault(group, []).append(value)
    uids = [str(group) for group, _ in samples]
    return SampleInputs(torch.tensor([value for _, value in samples], dtype=torch.float64), groups_of(uids)), groups


@given(SAMPLES)
def test_grpo_is_the_distance_to_the_groups_mean_in_its_deviations(samples: list[tuple[int, float]]) -> None:
    inputs, groups = inputs_of(samples)
    for found, (group, value) in zip(grpo(inputs).tolist(), samples, strict=True):
        mine = groups[group]
        expected = 0.0 if max(mine) == min(mine) else (value - mean(mine)) / (stdev(mine) + 1e-6)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(SAMPLES)
def test_rloo_is_the_distance_to_the_mean_of_the_others(samples: list[tuple[int, float]]) -> None:
    inputs, groups = inputs_of(samples)
    for found, (group, value) in zip(rloo(inputs).tolist(), samples, strict=True):
        others = list(groups[group])
        others.remove(value)
        assert found == pytest.approx(value - mean(others) if others else 0.0, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("estimator", [grpo, rloo])
@given(value=st.floats(-1e6, 1e6, allow_nan=False), size=st.integers(1, 9))
def test_a_group_without_spread_has_advantages_of_exactly_zero(estimator, value: float, size: int) -> None:  # type: ignore[no-untyped-def]
    inputs = SampleInputs(torch.full((size,), value), torch.zeros(size, dtype=torch.int64))
    assert estimator(inputs).tolist() == [0.0] * size


def test_the_share_of_groups_with_spread_counts_groups() -> None:
    inputs, _ = inputs_of([(1, 0.1), (1, 0.1), (2, 0.0), (2, 1.0), (3, 5.0), (1, 0.1), (4, 2.0), (4, 2.5)])
    assert spread_fraction(inputs) == 0.5


def test_groups_are_numbered_as_their_prompts_appear() -> None:
    assert groups_of(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]


def test_returns_and_groups_must_fit_together() -> None:
    with pytest.raises(TensorInputError, match=r"groups has shape \(2,\) .* but needs shape \(3,\)"):
        grpo(SampleInputs(torch.zeros(3), torch.zeros(2, dtype=torch.int64)))


def test_gae_without_values_is_an_error() -> None:
    with pytest.raises(TensorInputError, match="critic"):
        gae_of_tokens(TokenInputs(torch.zeros(3), torch.tensor([0, 3]), None, 1.0, 1.0))


def test_numbers_that_are_no_numbers_stay_visible() -> None:
    inputs = SampleInputs(torch.tensor([math.nan, 1.0, 2.0]), torch.tensor([0, 0, 1]))
    assert all(math.isnan(value) for value in grpo(inputs).tolist()[:2])
