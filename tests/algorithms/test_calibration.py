"""Promises of rlhf_ray.algorithms.calibration, against formulas worked out by hand."""

import math

import numpy as np
import pytest

from rlhf_ray.algorithms.calibration import (
    accuracy_by_bucket,
    clustered_share,
    expected_calibration_error,
    reliability,
    wilson_interval,
)


def test_wilson_bounds_are_where_the_score_test_gives_up() -> None:
    """The definition: a bound b is a share from which the found one is z standard errors away."""
    for right, trials in ((7, 10), (850, 1000), (1, 3), (3.5, 8.25)):
        p = right / trials
        for bound in wilson_interval(right, trials):
            assert abs(p - bound) / math.sqrt(bound * (1 - bound) / trials) == pytest.approx(1.959964)


def test_wilson_has_published_values() -> None:
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_independent_pairs_have_wilsons_interval() -> None:
    correct = np.array([True] * 83 + [False] * 17)
    share = clustered_share(correct, np.arange(100))
    assert (share.value, share.count) == (0.83, 100)
    assert (share.low, share.high) == pytest.approx(wilson_interval(83, 100))


def test_pairs_that_only_repeat_each_other_count_once() -> None:
    once = np.array([True] * 83 + [False] * 17)
    share = clustered_share(np.repeat(once, 6), np.repeat(np.arange(100), 6))
    assert (share.value, share.count) == (0.83, 600)
    assert (share.low, share.high) == pytest.approx(wilson_interval(83, 100))


def test_an_interval_is_never_narrower_than_that_of_independent_pairs() -> None:
    # Each cluster has one right and one wrong: no variance between them.
    correct, clusters = np.array([True, False] * 20 + [True]), np.append(np.repeat(np.arange(20), 2), 20)
    share = clustered_share(correct, clusters)
    assert (share.low, share.high) == pytest.approx(wilson_interval(21, 41))


def test_without_a_mistake_the_clusters_count() -> None:
    share = clustered_share(np.ones(60, bool), np.repeat(np.arange(10), 6))
    assert (share.value, share.low, share.high) == pytest.approx((1.0, *wilson_interval(10, 10)))


def test_buckets_have_equally_many_pairs_and_their_own_accuracy() -> None:
    values = np.array([8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 5.0, 4.0])
    found = accuracy_by_bucket(values, values > 2.5, np.arange(8))
    assert [(bucket.low, bucket.high, bucket.accuracy.count) for bucket in found] == [
        (1.0, 2.0, 2),
        (3.0, 4.0, 2),
        (5.0, 6.0, 2),
        (7.0, 8.0, 2),
    ]
    assert [bucket.accuracy.value for bucket in found] == [0.0, 1.0, 1.0, 1.0]


def test_equal_values_are_in_one_bucket() -> None:
    many = accuracy_by_bucket(np.array([1.0, 2.0, 2.0, 2.0, 2.0, 3.0, 4.0, 5.0]), np.ones(8, bool), np.arange(8))
    assert [(bucket.low, bucket.high) for bucket in many] == [(1.0, 1.0), (2.0, 3.0), (4.0, 5.0)]
    found = accuracy_by_bucket(np.array([1.0, 1.0, 1.0, 1.0, 1.0, 2.0]), np.ones(6, bool), np.arange(6))
    assert [(bucket.low, bucket.high, bucket.accuracy.count) for bucket in found] == [(1.0, 1.0, 5), (2.0, 2.0, 1)]
    assert accuracy_by_bucket(np.empty(0), np.empty(0, bool), np.empty(0, np.int64)) == []


def test_reliability_and_ece_have_hand_worked_values() -> None:
    confidence = np.array([0.51, 0.53, 0.5, 0.92, 0.94, 1.0])
    correct = np.array([True, False, False, True, True, True])
    bins = reliability(confidence, correct)
    assert [(b.count, b.accuracy) for b in bins] == [(3, 1 / 3), (2, 1.0), (1, 1.0)]
    assert [b.confidence for b in bins] == pytest.approx([1.54 / 3, 0.93, 1.0])
    assert [(b.low, b.high) for b in bins] == [pytest.approx(e) for e in ((0.5, 0.55), (0.9, 0.95), (0.95, 1.0))]
    assert expected_calibration_error(bins) == pytest.approx((0.54 + 2 * 0.07 + 0) / 6)


def test_a_model_that_is_as_often_right_as_it_says_has_no_calibration_error() -> None:
    random = np.random.default_rng(1)
    confidence = random.uniform(0.5, 1, 400_000)
    correct = random.random(400_000) < confidence
    assert expected_calibration_error(reliability(confidence, correct)) < 0.005
    overconfident = expected_calibration_error(reliability(np.sqrt(confidence), correct))
    assert overconfident == pytest.approx(float((np.sqrt(confidence) - confidence).mean()), abs=0.005)
