from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.actors.group import ActorGroup, slices_of
from rlhf_ray.actors.policy import PolicyWorker
from rlhf_ray.actors.shards import GeneratedShard, ShardFacts
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


def test_arguments_of_a_data_parallel_rank_go_to_all_ranks_that_share_its_sequences() -> None:
    group = ActorGroup("policy", [Method() for _ in range(6)], sp_size=3)
    assert (len(group), group.dp_size) == (6, 2)
    assert group.call_each(PolicyWorker.update, [("a", 1), ("b", 2)]).refs == [("a", 1)] * 3 + [("b", 2)] * 3


def test_every_rank_has_arguments_of_its_own_by_default() -> None:
    group = ActorGroup("policy", [Method(), Method()])
    assert group.call_each(PolicyWorker.update, [("a",), ("b",)]).refs == [("a",), ("b",)]
    with pytest.raises(ValueError, match="shorter"):
        group.call_each(PolicyWorker.update, [("a",)])


def test_ranks_take_turns_with_shards_when_there_are_many() -> None:
    group = ActorGroup("policy", [Method(rank) for rank in range(3)])
    calls = [group.call_shard(PolicyWorker.logprobs, shard(number, 100, samples=16)).refs for number in range(4)]
    assert calls == [[(rank, "data", 0, 1)] for rank in (0, 1, 2, 0)]


def test_ranks_share_shards_when_there_are_few() -> None:
    group = ActorGroup("policy", [Method(rank) for rank in range(3)])
    assert group.call_shard(PolicyWorker.logprobs, shard(1, 2, samples=16)).refs == [
        (0, "data", 0, 3),
        (1, "data", 1, 3),
        (2, "data", 2, 3),
    ]
    assert group.call_shard(PolicyWorker.logprobs, shard(0, 1, samples=2)).refs == [
        (0, "data", 0, 2),
        (1, "data", 1, 2),
    ]


def test_ranks_that_share_sequences_get_the_same_slice() -> None:
    group = ActorGroup("policy", [Method(rank) for rank in range(4)], sp_size=2)
    assert group.call_shard(PolicyWorker.logprobs, shard(1, 100, samples=16)).refs == [
        (2, "data", 0, 1),
        (3, "data", 0, 1),
    ]


def test_all_ranks_take_part_in_each_pass_of_zero_3() -> None:
    group = ActorGroup("policy", [Method(rank) for rank in range(3)], sharded=True)
    assert group.call_shard(PolicyWorker.logprobs, shard(1, 100, samples=3)).refs == [
        (rank, "data", rank, 3) for rank in range(3)
    ]
    assert group.call_shard(PolicyWorker.logprobs, shard(1, 100, samples=2)).refs == [
        (rank, "data", 0, 1) for rank in range(3)
    ]


@given(samples=st.integers(1, 99), shards=st.integers(1, 500), dp_size=st.integers(1, 64), sp_size=st.integers(1, 2))
def test_each_slice_of_each_shard_is_worked_on_once_and_work_is_even(
    samples: int, shards: int, dp_size: int, sp_size: int
) -> None:
    group = ActorGroup("policy", [Method(rank) for rank in range(dp_size * sp_size)], sp_size)
    work: Counter[int] = Counter()
    for number in range(shards):
        calls = group.call_shard(PolicyWorker.logprobs, shard(number, shards, samples)).refs
        slices = slices_of(samples, shards, dp_size, sharded=False)
        assert slices <= samples
        assert [call[2:] for call in calls] == [(index, slices) for index in range(slices) for _ in range(sp_size)]
        work.update(call[0] for call in calls)
    counts = [work[rank] for rank in range(len(group))]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) <= sp_size * (shards + 8 * dp_size), "calls grow with shards and with ranks, not with both"
