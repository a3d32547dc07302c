"""Promises of rlhf_ray.algorithms.scores, against plain Python floats."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.errors import OptionError, SampleError, TensorInputError
from rlhf_ray.algorithms.scores import ScoreShaper

steps = st.lists(
    st.lists(st.tuples(st.floats(-20, 20), st.booleans()), min_size=1, max_size=10), min_size=1, max_size=5
)


def shape(shaper: ScoreShaper, step: list[tuple[float, bool]]) -> list[float]:
    scores = torch.tensor([score for score, _ in step], dtype=torch.float64)
    result: list[float] = shaper.shape(scores, torch.tensor([cut for _, cut in step])).tolist()
    return result


@settings(deadline=None)
@given(steps, st.booleans(), st.none() | st.floats(0.1, 5), st.floats(0, 3))
def test_scores_equal_a_loop_in_float64_over_several_steps(
    steps: list[list[tuple[float, bool]]], normalize: bool, clip: float | None, penalty: float
) -> None:
    shaper = ScoreShaper(normalize=normalize, score_clip=clip, truncation_penalty=penalty)
    seen: list[float] = []
    for step in steps:
        seen += [score for score, _ in step]
        mean = sum(seen) / len(seen)
        variance = sum((x - mean) ** 2 for x in seen) / len(seen)
        want = []
        for score, cut in step:
            if normalize:
                score = (score - mean) / math.sqrt(variance + 1e-8)
            if clip is not None:
                score = max(-clip, min(clip, score))
            want.append(score - penalty if cut else score)
        assert shape(shaper, step) == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_plain_shaper_changes_nothing() -> None:
    assert shape(ScoreShaper(), [(3.0, True), (-500.0, False)]) == [3.0, -500.0]


def test_clip_comes_before_the_penalty() -> None:
    shaper = ScoreShaper(score_clip=1.0, truncation_penalty=0.5)
    assert shape(shaper, [(9.0, True), (9.0, False), (-9.0, True), (0.25, True)]) == [0.5, 1.0, -1.5, -0.25]


def test_clip_comes_after_normalisation() -> None:
    # mean 5, deviation 5: normalised to -1 and 1, inside the clip although the raw 10 is not
    assert shape(ScoreShaper(normalize=True, score_clip=2.0), [(0.0, False), (10.0, False)]) == pytest.approx([-1, 1])


def test_running_moments_include_this_step_and_those_before() -> None:
    shaper = ScoreShaper(normalize=True)
    shape(shaper, [(0.0, False), (2.0, False)])
    assert shape(shaper, [(4.0, False), (6.0, False)]) == pytest.approx([1 / math.sqrt(5), 3 / math.sqrt(5)])
    assert (shaper.moments.count, shaper.moments.mean) == (4.0, 3.0)


def test_equal_scores_normalise_to_zero() -> None:
    shaper = ScoreShaper(normalize=True)
    assert shaper.shape(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.bool)).tolist() == [0.0] * 3


def test_shaper_continues_exactly_from_its_state() -> None:
    first, later = [(0.1, False), (0.7, True)], [(0.2, False), (-0.3, False)]
    whole, before, after = (ScoreShaper(normalize=True, score_clip=5.0) for _ in range(3))
    shape(whole, first)
    shape(before, first)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert shape(after, later) == shape(whole, later)
    assert after.moments == whole.moments


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_named_and_leaves_the_moments(bad: float) -> None:
    shaper = ScoreShaper(normalize=True)
    shape(shaper, [(1.0, False)])
    before = shaper.moments
    with pytest.raises(SampleError, match="positions 1 have a score that is NaN or infinite") as raised:
        shape(shaper, [(1.0, False), (bad, False)])
    assert raised.value.samples == [1]
    assert shaper.moments == before


def test_truncated_is_one_bool_per_score() -> None:
    with pytest.raises(TensorInputError, match="truncated"):
        ScoreShaper().shape(torch.zeros(2), torch.zeros(1, dtype=torch.bool))
    with pytest.raises(TensorInputError, match=r"torch\.bool"):
        ScoreShaper().shape(torch.zeros(2), torch.zeros(2))


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(OptionError, match="score_clip is 0"):
        ScoreShaper(score_clip=0.0)
    with pytest.raises(OptionError, match="truncation_penalty is -1"):
        ScoreShaper(truncation_penalty=-1.0)


@pytest.mark.parametrize("normalize", [True, False])
def test_inputs_are_left_alone(normalize: bool) -> None:
    scores = torch.tensor([1.0, 9.0])
    ScoreShaper(normalize=normalize, score_clip=0.5, truncation_penalty=1.0).shape(scores, torch.tensor([True, False]))
    assert scores.tolist() == [1.0, 9.0]
