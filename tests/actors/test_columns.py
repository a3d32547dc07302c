from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.actors.columns import RankBatch, assemble, micro_batches, response_column
from rlhf_ray.actors.worker import DataSlice
from rlhf_ray.data.columns import ColumnPart, Columns, TrainingShard
from rlhf_ray.data.trajectory import TrajectoryBatch
from rlhf_ray.models.responses import ResponsePack

MakeBatch = Callable[..., TrajectoryBatch]
SAMPLES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=4, max_size=20)


def of_tokens(pack: ResponsePack) -> torch.Tensor:
    """A column that tells which token it stands for."""
    return pack.targets * 2.0


@settings(deadline=None)
@given(samples=SAMPLES, count=st.integers(1, 4), sp_size=st.integers(1, 2), max_tokens=st.integers(1, 60))
def test_the_ranks_parts_make_the_whole_column(
    make_batch: MakeBatch, samples: list[tuple[int, int]], count: int, sp_size: int, max_tokens: int
) -> None:
    """Also where several ranks work on the same samples."""
    batch = make_batch([p for p, _ in samples], [r for _, r in samples])
    ranks = [DataSlice(rank // sp_size, count, reports=rank % sp_size == 0) for rank in range(count * sp_size)]
    parts = [response_column(batch, each, max_tokens, of_tokens) for each in ranks]
    assert sorted(sample for part in parts for sample in part.samples) == list(range(len(batch)))
    assert assemble(parts, batch).tolist() == (batch.response_tokens * 2.0).tolist()


@settings(deadline=None)
@given(samples=SAMPLES, ranks=st.integers(1, 4), max_tokens=st.integers(1, 60))
def test_all_ranks_make_the_same_number_of_passes(
    make_batch: MakeBatch, samples: list[tuple[int, int]], ranks: int, max_tokens: int
) -> None:
    batch = make_batch([p for p, _ in samples], [r for _, r in samples])
    plans = [micro_batches(batch, DataSlice(rank, ranks), max_tokens) for rank in range(ranks)]
    assert len({len(plan) for plan in plans}) == 1
    assert sorted(s for plan in plans for micro in plan for s in micro) == list(range(len(batch)))
    lengths = batch.prompt_lengths + batch.response_lengths
    for plan in plans:
        assert all(len(micro) <= 1 or lengths[micro].sum() <= max_tokens for micro in plan)


def test_a_missing_part_leaves_no_number_behind(make_batch: MakeBatch) -> None:
    batch = make_batch([2, 2], [1, 2])
    column = assemble([ColumnPart((1,), np.array([5.0, 6.0], np.float32))], batch)
    assert column[1:].tolist() == [5.0, 6.0]
    assert torch.isnan(column[0])


@settings(deadline=None)
@given(samples=SAMPLES, data=st.data())
def test_a_rank_batch_holds_its_samples_with_their_columns(
    make_batch: MakeBatch, samples: list[tuple[int, int]], data: st.DataObject
) -> None:
    whole = make_batch([p for p, _ in samples], [r for _, r in samples])
    everything = range(len(whole))
    mine = data.draw(st.lists(st.sampled_from(everything), min_size=1, unique=True))
    cuts = data.draw(st.lists(st.integers(1, len(whole) - 1), max_size=3, unique=True).map(sorted))
    starts = [0, *cuts]
    shards = [
        TrainingShard(shard := whole.select(list(everything[start:end])), columns_of(shard))
        for start, end in zip(starts, [*cuts, len(whole)], strict=True)
    ]
    held = RankBatch.of(shards, starts, mine)
    assert len(held.samples.batch) == len(mine)
    order = data.draw(st.permutations(mine))
    pack, columns = held.pack(order)
    assert pack.targets.tolist() == np.concatenate([whole.response(sample) for sample in order]).tolist()
    for factor, name in enumerate(COLUMNS, start=1):
        assert getattr(columns, name).tolist() == (pack.targets * float(factor)).tolist()
    assert held.names(order) == [f"{whole.uids[sample]}#0" for sample in order]


COLUMNS = ("old_logprobs", "values", "advantages", "returns")


def columns_of(batch: TrajectoryBatch) -> Columns:
    """Columns that tell which token they stand for, and which column they are."""
    tokens = batch.response_tokens.astype(np.float32)
    return Columns(**{name: factor * tokens for factor, name in enumerate(COLUMNS, start=1)})


def test_advantages_of_whole_samples_are_those_of_all_their_tokens(make_batch: MakeBatch) -> None:
    batch = make_batch([2, 3, 1], [4, 1, 2])
    shard = TrainingShard(batch, Columns(old_logprobs=batch.response_tokens.astype(np.float32)))
    held = RankBatch.of([shard], [0], [0, 2], np.array([0.5, 9.0, -1.0], np.float32))
    _, columns = held.pack([2, 0])
    assert columns.advantages is not None
    assert columns.advantages.tolist() == [-1.0] * 2 + [0.5] * 4
    assert columns.values is None
    assert columns.engine_logprobs is not None
    assert columns.engine_logprobs.tolist() == [*batch.engine_logprobs[5:], *batch.engine_logprobs[:4]]


def test_a_rank_without_samples_packs_a_dummy(make_batch: MakeBatch) -> None:
    batch = make_batch([2, 3], [4, 5])
    pack, columns = RankBatch.of([TrainingShard(batch, columns_of(batch))], [0], [1]).pack([])
    assert len(pack.positions) == len(columns.advantages) == len(pack.lengths) == 0
    assert pack.packed.input_ids.shape == (1, 1)


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_shards_are_joined_in_order(make_batch: MakeBatch, name: str) -> None:
    first, second = columns_of(make_batch([1], [3], seed=1)), columns_of(make_batch([1], [2], seed=2))
    joined = getattr(Columns.concat([first, second]), name)
    assert joined.tolist() == [*getattr(first, name), *getattr(second, name)]
