"""How often a model that compares is right, how sure one can be of that, and how sure it is itself.

All functions take flat float or bool arrays over judged pairs, `[pairs]`, and return plain numbers.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]

# Of the normal distribution, 95 % lie within so many standard deviations.
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Share:
    """A share of right answers.

    Attributes:
        value: right ÷ count.
        low, high: 95 % confidence interval.
        count: answers.
    """

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Bucket:
    """Pairs whose value lies from `low` to `high`, and the share of them that is right."""

    low: float
    high: float
    accuracy: Share


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs whose confidence lies from `low` to `high`.

    Attributes:
        low, high: bounds of the bin.
        count: pairs in it.
        confidence: mean of their confidences.
        accuracy: share of them that is right.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def wilson_interval(right: float, trials: float, z: float = Z_95) -> tuple[float, float]:
    """Bounds of a share of `right` of `trials`, which stay within 0 and 1 and hold for small counts too.

        centre = (p + z² / 2n) / (1 + z² / n),   half = z / (1 + z² / n) · sqrt(p (1 - p) / n + z² / 4n²)

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22.

    Args:
        right: at least 0.
        trials: at least `right`, above 0; may be a fraction, such as an effective number of trials.
        z: standard deviations of the normal distribution; the default gives 95 %.
    """
    p, spread = right / trials, z * z / trials
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_share(correct: Bools, clusters: NDArray[np.integer]) -> Share:
    """Share of right pairs, with an interval that knows that the pairs of a ranking share their candidates.

    The interval is Wilson's for an effective number of pairs: as many independent ones as would give the share the
    variance that it has between clusters. It is never more than the number of pairs, and with one pair in each cluster
    it is that number. Where all pairs are right, or none, it is the number of clusters.

    Source: the ratio estimator's variance, Cochran 1977, "Sampling Techniques", section 6.3; the effective number as in
    Korn and Graubard 1998, "Confidence Intervals for Proportions with Small Expected Number of Positive Counts".

    Args:
        correct: `[pairs]`, at least one.
        clusters: `[pairs]`, which row each pair is of.
    """
    _, cluster = np.unique(clusters, return_inverse=True)
    count, right = len(correct), float(correct.sum())
    p = right / count
    off_by = np.bincount(cluster, weights=correct - p)
    variance = float((off_by**2).sum()) / count**2
    effective = min(p * (1 - p) / variance, count) if variance > 0 else float(cluster.max() + 1)
    low, high = wilson_interval(p * effective, effective)
    return Share(p, low, high, count)


def accuracy_by_bucket(values: Floats, correct: Bools, clusters: NDArray[np.integer], buckets: int = 4) -> list[Bucket]:
    """Pairs in buckets of about equally many by some value of theirs, and how many of each bucket are right.

    Equal values stay together. Where there are no more of them than buckets, each has its own.

    Args:
        values: `[pairs]`.
        correct: `[pairs]`.
        clusters: `[pairs]`, as in `clustered_share`.
        buckets: at least 1.
    """
    edges = np.unique(values)[1:]
    if len(edges) >= buckets:
        edges = np.quantile(values, np.arange(1, buckets) / buckets)
    bucket = np.searchsorted(edges, values, side="right")
    found = []
    for number in np.unique(bucket):
        inside = bucket == number
        share = clustered_share(correct[inside], clusters[inside])
        found.append(Bucket(float(values[inside].min()), float(values[inside].max()), share))
    return found


def reliability(confidence: Floats, correct: Bools, bins: int = 10) -> list[ReliabilityBin]:
    """What a model is right about at each confidence: bins of equal width from 0.5 to 1, the empty ones left out.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599, section 2.

    Args:
        confidence: probability that the model gives to its own answer, `[pairs]`, from 0.5 to 1.
        correct: whether that answer is right, `[pairs]`.
        bins: at least 1.
    """
    width = 0.5 / bins
    number = np.clip(((confidence - 0.5) / width).astype(int), 0, bins - 1)
    return [
        ReliabilityBin(
            low=0.5 + n * width,
            high=0.5 + (n + 1) * width,
            count=int((number == n).sum()),
            confidence=float(confidence[number == n].mean()),
            accuracy=float(correct[number == n].mean()),
        )
        for n in np.unique(number).tolist()
    ]


def expected_calibration_error(bins: list[ReliabilityBin]) -> float:
    """Mean distance of confidence and accuracy over bins, each weighed by its pairs.

        ECE = Σ_b count_b / count · |accuracy_b - confidence_b|

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / sum(b.count for b in bins)
