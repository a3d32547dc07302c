import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.data.cursor import PromptCursor
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.data.requests import PromptRequest, cut_evenly, cut_into_shards, requests_for, shard_count
from rlhf_ray.data.seeds import sample_seed
from rlhf_ray.data.trajectory import offsets_of


def prompt_set(lengths: list[int]) -> PromptSet:
    tokens = np.arange(sum(lengths), dtype=np.int32)
    return PromptSet(tuple(f"u{i}" for i in range(len(lengths))), tokens, offsets_of(lengths), dropped=0, truncated=0)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    taken=st.integers(0, 40),
    samples=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_each_sample_of_each_visited_prompt_is_asked_for_exactly_once(
    lengths: list[int], taken: int, samples: int, seed: int
) -> None:
    prompts = prompt_set(lengths)
    tickets = PromptCursor(len(prompts), seed, shuffle=True).take(taken)
    requests = requests_for(prompts, tickets, samples, seed)
    assert [(r.uid, r.sample_index) for r in requests] == [
        (f"u{ticket.index}@{ticket.epoch}", index) for ticket in tickets for index in range(samples)
    ]
    assert len({(r.uid, r.sample_index) for r in requests}) == len({r.seed for r in requests}) == taken * samples
    for request, ticket in zip(requests, (t for t in tickets for _ in range(samples)), strict=True):
        assert list(request.tokens) == prompts.tokens(ticket.index).tolist()
        assert request.seed == sample_seed(seed, request.uid, request.sample_index)


@settings(deadline=None)
@given(count=st.integers(1, 200), size=st.integers(1, 50))
def test_shards_hold_each_request_exactly_once_and_in_order(count: int, size: int) -> None:
    requests = [PromptRequest(f"u{i}", 0, i, np.array([i], np.int32)) for i in range(count)]
    shards = cut_into_shards(requests, size)
    assert [id(request) for shard in shards for request in shard] == [id(request) for request in requests]
    sizes = [len(shard) for shard in shards]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert len(shards) == shard_count(count, size)


def test_shards_are_as_few_as_fit() -> None:
    assert [shard_count(samples, 8) for samples in (1, 8, 9, 16, 17)] == [1, 1, 2, 2, 3]


@given(count=st.integers(1, 60), parts=st.integers(1, 60))
def test_parts_in_order_hold_everything_and_are_as_even_as_can_be(count: int, parts: int) -> None:
    found = cut_evenly(range(count), parts)
    assert len(found) == parts
    assert [item for part in found for item in part] == list(range(count))
    assert max(map(len, found)) - min(map(len, found)) <= 1
