from dataclasses import fields

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.data.trajectory import Trajectory, TrajectoryBatch, offsets_of

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=6)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    response = draw(TOKENS)
    return Trajectory(
        uid=draw(st.text(max_size=4)),
        sample_index=draw(st.integers(0, 9)),
        seed=draw(st.integers(0, 2**63 - 1)),
        prompt_tokens=draw(TOKENS),
        response_tokens=response,
        engine_logprobs=draw(st.lists(st.floats(-50, 0, width=32), min_size=len(response), max_size=len(response))),
        weight_versions=draw(st.lists(st.integers(0, 99), min_size=len(response), max_size=len(response))),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        row=draw(st.sampled_from([b"{}", b'{"answer":7}', b'{"answer":"\xc3\xbc"}'])),
    )


@settings(deadline=None)
@given(st.lists(trajectories(), max_size=6))
def test_a_batch_gives_back_what_was_put_in(samples: list[Trajectory]) -> None:
    batch = TrajectoryBatch.of(samples)
    assert len(batch) == len(samples)
    for i, sample in enumerate(samples):
        where = batch.response_slice(i)
        assert batch.uids[i] == sample.uid
        assert batch.sample_index[i] == sample.sample_index
        assert batch.seeds[i] == sample.seed
        assert batch.prompt(i).tolist() == sample.prompt_tokens
        assert batch.response(i).tolist() == sample.response_tokens
        assert batch.engine_logprobs[where].tolist() == sample.engine_logprobs
        assert batch.weight_versions[where].tolist() == sample.weight_versions
        assert batch.rows.json(i) == sample.row
        assert batch.truncated[i] == (sample.finish_reason == "length")
    assert batch.prompt_lengths.tolist() == [len(s.prompt_tokens) for s in samples]
    assert batch.response_lengths.tolist() == [len(s.response_tokens) for s in samples]


@settings(deadline=None)
@given(st.lists(trajectories(), max_size=4))
def test_columns_have_the_documented_types(samples: list[Trajectory]) -> None:
    batch = TrajectoryBatch.of(samples)
    found = {f.name: getattr(batch, f.name).dtype.name for f in fields(batch) if f.name not in ("uids", "rows")}
    assert found == {
        "sample_index": "int32",
        "seeds": "int64",
        "prompt_tokens": "int32",
        "prompt_offsets": "int64",
        "response_tokens": "int32",
        "response_offsets": "int64",
        "engine_logprobs": "float32",
        "weight_versions": "int32",
        "truncated": "bool",
        "loss_mask": "bool",
    }


def assert_same(found: TrajectoryBatch, expected: TrajectoryBatch) -> None:
    assert list(map(found.rows.json, range(len(found)))) == list(map(expected.rows.json, range(len(expected))))
    for f in (f for f in fields(TrajectoryBatch) if f.name != "rows"):
        np.testing.assert_array_equal(getattr(found, f.name), getattr(expected, f.name), strict=f.name != "uids")


@settings(deadline=None)
@given(st.lists(trajectories(), min_size=1, max_size=6), st.data())
def test_selected_samples_come_whole_and_in_the_order_asked_for(samples: list[Trajectory], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(samples) - 1), max_size=8))
    assert_same(TrajectoryBatch.of(samples).select(chosen), TrajectoryBatch.of([samples[i] for i in chosen]))


@settings(deadline=None)
@given(st.lists(st.lists(trajectories(), max_size=3), min_size=1, max_size=4))
def test_concatenated_batches_are_the_batch_of_all_samples(groups: list[list[Trajectory]]) -> None:
    whole = TrajectoryBatch.of([sample for group in groups for sample in group])
    assert_same(TrajectoryBatch.concat([TrajectoryBatch.of(group) for group in groups]), whole)


def test_the_size_of_a_batch_is_that_of_its_arrays() -> None:
    batch = TrajectoryBatch.of([Trajectory("a", 0, 1, [1, 2], [3], [-0.5], [0], "stop")])
    rows = 2 + 2 * 8 + 8  # {}
    assert batch.nbytes() == 4 + 8 + 2 * 4 + 2 * 8 + 4 + 2 * 8 + 4 + 4 + 1 + 1 + rows


def test_offsets_begin_at_zero_and_end_at_the_sum() -> None:
    assert offsets_of([]).tolist() == [0]
    assert offsets_of([2, 0, 3]).tolist() == [0, 2, 2, 5]
    assert offsets_of([2**40, 1]).dtype == np.int64
