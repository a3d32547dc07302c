from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.actors.group import ActorGroup, parts_of
from rlhf_ray.actors.rollout import GeneratedShard, ShardFacts
from rlhf_ray.data.trajectory import TrajectoryBatch


class Method:
    """Stands where an actor and its method do, and gives back what it is called with, behind its own name if any."""

    def __init__(self, *name: Any) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Any:
        return Method(*self.name) if name != "remote" else lambda *arguments: (*self.name, *arguments)


def shard(number: int, shards: int, samples: int) -> GeneratedShard:
    facts = ShardFacts.of(TrajectoryBatch.of([]), 0)
    return GeneratedShard(number, shards, "data", replace(facts, uids=("uid",) * samples))  # type: ignore[arg-type]


def test_each_share_goes_to_all_ranks_that_work_on_it() -> None:
    group = ActorGroup("policy", [Method() for _ in range(6)], sequence_parallel=3)
    assert (len(group), group.shares) == (6, 2)
    assert group.call_each("update", [("a", 1), ("b", 2)]) == [("a", 1)] * 3 + [("b", 2)] * 3


def test_every_rank_has_a_share_of_its_own_by_default() -> None:
    group = ActorGroup("policy", [Method(), Method()])
    assert group.call_each("update", [("a",), ("b",)]) == [("a",), ("b",)]
    with pytest.raises(ValueError, match="shorter"):
        group.call_each("update", [("a",)])


def test_ranks_take_turns_with_shards_when_there_are_many() -> None:
    group = ActorGroup("policy", [Method(rank) for rank in range(3)])
    calls = [group.call_on("logprobs", shard(number, 100, samples=16)) for number in range(4)]
    assert calls == [[(rank, "data", 0, 1)] for rank in (0, 1, 2, 0)]


def test_ranks_share_shards_when_there_are_few() -> None:
    group = ActorGroup("policy", [Method(rank) for rank in range(3)])
    assert group.call_on("logprobs", shard(1, 2, samples=16)) == [
        (0, "data", 0, 3),
        (1, "data", 1, 3),
        (2, "data", 2, 3),
    ]
    assert group.call_on("logprobs", shard(0, 1, samples=2)) == [(0, "data", 0, 2), (1, "data", 1, 2)]


def test_ranks_that_share_sequences_get_the_same_part() -> None:
    group = ActorGroup("policy", [Method(rank) for rank in range(4)], sequence_parallel=2)
    assert group.call_on("logprobs", shard(1, 100, samples=16)) == [(2, "data", 0, 1), (3, "data", 0, 1)]


def test_all_ranks_take_part_in_each_pass_of_zero_3() -> None:
    group = ActorGroup("policy", [Method(rank) for rank in range(3)], sharded=True)
    assert group.call_on("logprobs", shard(1, 100, samples=3)) == [(rank, "data", rank, 3) for rank in range(3)]
    assert group.call_on("logprobs", shard(1, 100, samples=2)) == [(rank, "data", 0, 1) for rank in range(3)]


@given(samples=st.integers(1, 99), shards=st.integers(1, 500), shares=st.integers(1, 64), together=st.integers(1, 2))
def test_each_part_of_each_shard_is_worked_on_once_and_work_is_even(
    samples: int, shards: int, shares: int, together: int
) -> None:
    group = ActorGroup("policy", [Method(rank) for rank in range(shares * together)], together)
    work: Counter[int] = Counter()
    for number in range(shards):
        calls = group.call_on("logprobs", shard(number, shards, samples))
        parts = parts_of(samples, shards, shares, sharded=False)
        assert parts <= samples
        assert [call[2:] for call in calls] == [(part, parts) for part in range(parts) for _ in range(together)]
        work.update(call[0] for call in calls)
    counts = [work[rank] for rank in range(len(group))]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) <= together * (shards + 8 * shares), "calls grow with shards and with ranks, not with both"
