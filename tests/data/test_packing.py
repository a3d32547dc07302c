from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.data.packing import plan_micro_batches


def dealt(lengths: list[int], parts: int) -> list[list[int]]:
    """Samples, the longest first, each in the part with the least so far."""
    found: list[list[int]] = [[] for _ in range(parts)]
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        min(found, key=lambda part: sum(lengths[i] for i in part)).append(sample)
    return [sorted(part) for part in found]


@st.composite
def micro_batch_cases(draw: st.DrawFn) -> tuple[list[int], int, int]:
    ranks = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(1, 60), min_size=ranks, max_size=60))
    return lengths, ranks, draw(st.integers(1, 150))


@settings(deadline=None)
@given(micro_batch_cases())
def test_micro_batches_hold_each_sample_once(case: tuple[list[int], int, int]) -> None:
    lengths, ranks, max_tokens = case
    plan = plan_micro_batches(lengths, ranks, max_tokens)
    assert len(plan) == ranks
    assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(len(lengths)))
    assert all(batch == sorted(batch) for rank in plan for batch in rank)


@settings(deadline=None)
@given(micro_batch_cases())
def test_every_rank_gets_the_same_number_of_micro_batches(case: tuple[list[int], int, int]) -> None:
    lengths, ranks, max_tokens = case
    plan = plan_micro_batches(lengths, ranks, max_tokens)
    count = len(plan[0])
    assert {len(rank) for rank in plan} == {count}
    empty = sum(not batch for rank in plan for batch in rank)
    assert empty == max(0, ranks * count - len(lengths))


@settings(deadline=None)
@given(micro_batch_cases())
def test_no_micro_batch_is_over_the_bound_unless_it_is_one_sample(case: tuple[list[int], int, int]) -> None:
    lengths, ranks, max_tokens = case
    for rank in plan_micro_batches(lengths, ranks, max_tokens):
        for batch in rank:
            assert len(batch) <= 1 or sum(lengths[i] for i in batch) <= max_tokens


@settings(deadline=None)
@given(micro_batch_cases())
def test_there_are_no_more_micro_batches_than_the_greedy_rule_needs(case: tuple[list[int], int, int]) -> None:
    lengths, ranks, max_tokens = case

    def fits(count: int) -> bool:
        parts = dealt(lengths, ranks * count)
        return all(len(part) <= 1 or sum(lengths[i] for i in part) <= max_tokens for part in parts)

    plan = plan_micro_batches(lengths, ranks, max_tokens)
    count = len(plan[0])
    assert sorted(batch for rank in plan for batch in rank) == sorted(dealt(lengths, ranks * count))
    assert fits(count)
    assert not any(fits(fewer) for fewer in range(1, count))


@settings(deadline=None)
@given(micro_batch_cases())
def test_ranks_carry_about_the_same(case: tuple[list[int], int, int]) -> None:
    lengths, ranks, max_tokens = case
    plan = plan_micro_batches(lengths, ranks, max_tokens)
    loads = [sum(lengths[i] for batch in rank for i in batch) for rank in plan]
    assert max(loads) <= min(loads) + max(lengths)


@settings(deadline=None)
@given(micro_batch_cases())
def test_micro_batches_with_the_same_number_are_similar_and_the_longest_come_first(
    case: tuple[list[int], int, int],
) -> None:
    lengths, ranks, max_tokens = case
    plan = plan_micro_batches(lengths, ranks, max_tokens)
    rounds = [[sum(lengths[i] for i in rank[m]) for rank in plan] for m in range(len(plan[0]))]
    assert all(min(earlier) >= max(later) for earlier, later in pairwise(rounds))


def test_a_sample_over_the_bound_is_alone() -> None:
    assert plan_micro_batches([100, 10, 10, 10], ranks=1, max_tokens=30) == [[[0], [1, 2, 3]]]


def test_two_ranks_share_four_samples() -> None:
    assert plan_micro_batches([8, 7, 2, 1], ranks=2, max_tokens=10) == [[[0, 3]], [[1, 2]]]


def test_the_rank_with_the_least_gets_the_largest_of_a_round() -> None:
    assert plan_micro_batches([10, 9, 8, 7], ranks=2, max_tokens=10) == [[[0], [3]], [[1], [2]]]


def test_a_plan_of_many_samples_is_made_at_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, 20_000)
    plan = plan_micro_batches(lengths, ranks=8, max_tokens=8192)
    assert sum(len(batch) for rank in plan for batch in rank) == 20_000
    assert len(plan[0]) <= 1.02 * lengths.sum() / (8 * 8192) + 1


@pytest.mark.parametrize(
    ("lengths", "ranks", "max_tokens", "message"),
    [
        ([5], 2, 8, r"the number of samples is 1, but must be at least the number of ranks \(2\)"),
        ([], 1, 8, "the number of samples is 0"),
        ([5, 0], 1, 8, r"lengths\[1\] is 0"),
        ([5], 0, 8, "ranks is 0"),
        ([5], 1, 0, "max_tokens is 0"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(lengths: list[int], ranks: int, max_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_micro_batches(lengths, ranks, max_tokens)
