import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.rewards.combine import combine
from rlhf_ray.rewards.errors import RewardError

SCORES = st.floats(-1e6, 1e6, width=32)


@settings(deadline=None)
@given(st.lists(st.tuples(SCORES, SCORES), max_size=20), st.floats(-10, 10), st.floats(-10, 10))
def test_the_score_is_the_weighted_sum(rows: list[tuple[float, float]], a: float, b: float) -> None:
    parts = {"x": np.array([row[0] for row in rows], np.float32), "y": np.array([row[1] for row in rows], np.float32)}
    total = combine(parts, {"y": b, "x": a})
    assert total.dtype == np.float32
    assert total.shape == (len(rows),)
    assert total.tolist() == [float(np.float32(b * y + a * x)) for x, y in rows]


def test_the_order_of_the_answers_does_not_matter() -> None:
    parts = {name: np.array([v], np.float32) for name, v in [("a", 2.0**60), ("b", 1.0), ("c", -(2.0**60))]}
    weights = {"a": 1.0, "b": 1.0, "c": 1.0}
    orders = ["abc", "acb", "cba"]
    assert [combine({name: parts[name] for name in order}, weights).tolist() for order in orders] == [[0.0]] * 3


ONE = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("parts", "weights", "part", "message"),
    [
        ({"a": ONE}, {"a": 1.0, "b": 1.0}, "b", r"reward 'b': gave no scores \(there are scores of a\)"),
        ({"a": ONE, "b": ONE}, {"a": 1.0}, "b", r"reward 'b': gave scores, but has no weight \(known parts: a\)"),
        ({}, {}, "sum", "no parts to sum"),
        (
            {"a": ONE, "b": np.zeros(3, np.float32)},
            {"a": 1.0, "b": 1.0},
            "b",
            r"shape \(3,\), but 'a' scored 2 samples",
        ),
        ({"a": np.zeros((2, 1), np.float32)}, {"a": 1.0}, "a", r"shape \(2, 1\)"),
        ({"a": ONE, "b": np.array([1, np.nan])}, {"a": 1.0, "b": 0.0}, "b", "reward 'b': is nan at batch positions 1,"),
        ({"a": np.array([np.inf, np.inf])}, {"a": 1.0}, "a", "is inf at batch positions 0, 1, but must be finite"),
        ({"a": np.array([1, 3e38])}, {"a": 10.0}, "sum", "reward 'sum': is inf at batch positions 1"),
    ],
)
def test_parts_that_cannot_be_summed_are_named(
    parts: dict[str, np.ndarray], weights: dict[str, float], part: str, message: str
) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        combine(parts, weights)
    assert caught.value.part == part


def test_a_reward_error_survives_pickling_and_names_few_of_many_samples() -> None:
    error = RewardError("vader", "it broke", [f"u{i}" for i in range(20)])
    assert str(error) == "reward 'vader': it broke (samples u0, u1, u2, u3, u4, u5, u6, u7 and 12 more)"
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.part, copied.reason, copied.samples) == (
        str(error),
        error.part,
        error.reason,
        error.samples,
    )
