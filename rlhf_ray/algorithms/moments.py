"""Count, mean and squared deviations of values that lie in several shards, and whitening with them."""

import math
from dataclasses import dataclass
from typing import Self, TypedDict

from torch import Tensor

from rlhf_ray.algorithms.checks import check_option
from rlhf_ray.algorithms.errors import AlgorithmInputError


class MomentsState(TypedDict):
    """What a checkpoint keeps of `Moments`."""

    count: float
    mean: float
    m2: float


@dataclass(frozen=True)
class Moments:
    """First two moments of a set of numbers; moments of parts merge into those of the whole.

    Attributes:
        count: how many numbers.
        mean: their mean, 0 when there is none.
        m2: sum of the squared deviations from the mean.
    """

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """Moments of all elements of a tensor of any shape, computed in float64; no elements give count 0."""
        if values.numel() == 0:
            return cls()
        x = values.detach().double()
        mean = x.mean()
        # The second pass removes the rounding of the first, so that equal values have a variance of exactly 0.
        mean = mean + (x - mean).mean()
        return cls(float(x.numel()), mean.item(), (x - mean).square().sum().item())

    @classmethod
    def weighted(cls, values: Tensor, counts: Tensor) -> Self:
        """Moments of numbers that each stand several times, `[n]` both, computed in float64."""
        x, n = values.detach().double(), counts.double()
        count = n.sum()
        if count == 0:
            return cls()
        mean = (n * x).sum() / count
        mean = mean + (n * (x - mean)).sum() / count
        return cls(count.item(), mean.item(), (n * (x - mean).square()).sum().item())

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets together.

            d    = mean_b - mean_a
            mean = mean_a + d · n_b / n
            m2   = m2_a + m2_b + d^2 · n_a · n_b / n

        Source: Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances", Stanford STAN-CS-79-773.
        """
        if self.count == 0:
            return other
        count = self.count + other.count
        d = other.mean - self.mean
        mean = self.mean + d * other.count / count
        return Moments(count, mean, self.m2 + other.m2 + d * d * self.count * other.count / count)

    @property
    def variance(self) -> float:
        """Population variance, m2 / count. Raises `AlgorithmInputError` when there are no values."""
        if self.count == 0:
            raise AlgorithmInputError("moments of no values have no variance; merge at least one non-empty shard")
        return self.m2 / self.count

    @property
    def std(self) -> float:
        """Square root of `variance`."""
        return math.sqrt(self.variance)

    def state_dict(self) -> MomentsState:
        """Three floats, exact through JSON."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    @classmethod
    def from_state(cls, state: MomentsState) -> Self:
        """The inverse of `state_dict`."""
        return cls(count=state["count"], mean=state["mean"], m2=state["m2"])


def whiten(values: Tensor, moments: Moments, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale values to unit variance, given the moments of the whole batch that they are a shard of.

        w = (x - mean) / sqrt(variance + eps)    and w + mean when the mean is not shifted

    Source: Ziegler et al. 2019, arXiv:1909.08593, `whiten` of its released code (population variance).

    Args:
        values: any shape.
        moments: of all values of the batch, not only of this shard.
        shift_mean: whether the result has mean 0; otherwise the mean is kept.
        eps: added to the variance, so that equal values give 0 and not a division by 0.

    Returns:
        Same shape and dtype as values, computed in float64.

    Raises:
        AlgorithmInputError: the moments are of no values.
        OptionError: eps is not above 0.
    """
    check_option("eps", eps, eps > 0, "above 0")
    whitened = (values.double() - moments.mean) / math.sqrt(moments.variance + eps)
    return (whitened if shift_mean else whitened + moments.mean).to(values.dtype)
