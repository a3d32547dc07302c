"""Which samples go together: planning on lengths alone, the same on every process."""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def plan_micro_batches(
    lengths: Sequence[int] | NDArray[np.integer], ranks: int, max_tokens: int
) -> list[list[list[int]]]:
    """Split one optimizer step into micro-batches of at most `max_tokens` for every rank.

    Every rank gets the same number of micro-batches, as ZeRO-3's collectives demand; it is the smallest for which
    the bound is met when samples are dealt longest first, each to the micro-batch with the least so far (Graham's
    longest-processing-time rule; ties go to the lowest index, of samples and of micro-batches). A sample over the
    bound is alone in its micro-batch. Ranks' loads differ by one sample's length at most, and micro-batches with the
    same number have similar sizes on all ranks, longest first, so ranks wait little for each other and memory peaks
    at once. Micro-batches are empty only when there are fewer samples than micro-batches.

    Args:
        lengths: tokens of each sample, `[samples]`, all positive.
        ranks: data-parallel ranks, at least 1.
        max_tokens: bound of one micro-batch, at least 1.

    Returns:
        `[rank][micro-batch]` lists of sample indices, ascending; each sample exactly once.

    Raises:
        ValueError: there are fewer samples than ranks, or a length, `ranks` or `max_tokens` is below 1.
    """
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}, but must be at least 1")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, but must be at least 1")
    known: list[int] = np.asarray(lengths, np.int64).tolist()
    if len(known) < ranks:
        raise ValueError(f"the number of samples is {len(known)}, but must be at least the number of ranks ({ranks})")
    for sample, length in enumerate(known):
        if length < 1:
            raise ValueError(f"lengths[{sample}] is {length}, but must be at least 1")
    order = sorted(range(len(known)), key=lambda sample: (-known[sample], sample))

    def fits(batches: list[list[int]]) -> bool:
        return all(len(batch) <= 1 or sum(known[i] for i in batch) <= max_tokens for batch in batches)

    # More bins never make the greedy rule's fullest bin fuller, so the smallest count can be searched by halving.
    tokens = sum(min(length, max_tokens) for length in known)
    low, high = max(1, -(-tokens // (max_tokens * ranks))), -(-len(known) // ranks)
    while low < high:
        middle = (low + high) // 2
        if fits(_deal(known, order, ranks * middle)):
            high = middle
        else:
            low = middle + 1
    batches = _deal(known, order, ranks * low)
    return _to_ranks(batches, [sum(known[i] for i in batch) for batch in batches], ranks)


def _to_ranks(batches: list[list[int]], loads: list[int], ranks: int) -> list[list[list[int]]]:
    """Deal rounds of `ranks` batches of similar load, the largest of a round to the rank with the least so far."""
    largest_first = sorted(range(len(batches)), key=lambda b: (-loads[b], b))
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    rank_loads = [0] * ranks
    for start in range(0, len(batches), ranks):
        least_first = sorted(range(ranks), key=lambda rank: (rank_loads[rank], rank))
        for rank, batch in zip(least_first, largest_first[start : start + ranks], strict=True):
            plan[rank].append(sorted(batches[batch]))
            rank_loads[rank] += loads[batch]
    return plan


def _deal(lengths: list[int], order: list[int], parts: int) -> list[list[int]]:
    dealt: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    for sample in order:
        load, part = loads[0]
        dealt[part].append(sample)
        heapq.heapreplace(loads, (load + lengths[sample], part))
    return dealt
