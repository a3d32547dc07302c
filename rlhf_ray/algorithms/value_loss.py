"""The clipped value loss of the critic, and how much of the returns' variance it explains."""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from rlhf_ray.algorithms.checks import check_option, check_vectors
from rlhf_ray.algorithms.moments import Moments


@dataclass(frozen=True)
class ValueLossOutput:
    """Flat tensors `[tokens]`.

    Attributes:
        loss: to be minimised; aggregate with `aggregation.token_weights`.
        clipped: detached, 1.0 where the clipped error is the larger one, so that the token gives no gradient.
    """

    loss: Tensor
    clipped: Tensor


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> ValueLossOutput:
    """Squared error of the critic, pessimistic about moves of more than `clip` from the old value.

        loss = 1/2 · max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)
        loss = 1/2 · (V - R)^2    when clip is None

    Source: the PPO code of OpenAI Baselines, written down in Engstrom et al. 2020, "Implementation Matters in Deep
    Policy Gradients", arXiv:2005.12729, section 3.

    Args:
        values: V of the critic in training, `[tokens]`; the only one that gets a gradient.
        old_values: V at rollout time, `[tokens]`.
        returns: R, `[tokens]`.
        clip: above 0, in units of the value; None for no clipping.

    Raises:
        TensorInputError: the shapes differ, or are not `[tokens]`.
        OptionError: clip is not above 0.
    """
    check_vectors(values=values, old_values=old_values, returns=returns)
    returns, old_values = returns.detach(), old_values.detach()
    error = (values - returns).square()
    if clip is None:
        return ValueLossOutput(loss=error / 2, clipped=torch.zeros_like(error))
    check_option("clip", clip, clip > 0, "above 0, or None")
    # Clamping V itself, not V - V_old, leaves a V inside the bounds exact.
    clipped_error = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    loss = torch.maximum(error, clipped_error) / 2
    return ValueLossOutput(loss=loss, clipped=(clipped_error > error).to(loss.dtype))


@dataclass(frozen=True)
class ExplainedVariance:
    """Explained variance of the returns by the values, from shards that merge over micro-batches and ranks.

        value = 1 - Var(R - V) / Var(R)

    1 is perfect, 0 is as good as a constant, below 0 is worse than a constant. Where the returns are constant the
    fraction has no value; as in scikit-learn's `explained_variance_score`, it is then 1 if the residuals are constant
    too, and 0 otherwise, so that the metric stays finite.

    Attributes:
        returns: moments of R.
        residuals: moments of R - V.
    """

    returns: Moments = field(default_factory=Moments)
    residuals: Moments = field(default_factory=Moments)

    @classmethod
    def of(cls, values: Tensor, returns: Tensor) -> Self:
        """From values `[tokens]` and returns `[tokens]`. Raises `TensorInputError` when the shapes differ."""
        check_vectors(values=values, returns=returns)
        return cls(Moments.of(returns), Moments.of(returns.double() - values.double()))

    def merge(self, other: "ExplainedVariance") -> "ExplainedVariance":
        """Of both shards together."""
        return ExplainedVariance(self.returns.merge(other.returns), self.residuals.merge(other.residuals))

    @property
    def value(self) -> float:
        """At most 1. Raises `AlgorithmInputError` when there are no tokens."""
        if self.returns.variance == 0:
            return 1.0 if self.residuals.variance == 0 else 0.0
        return 1 - self.residuals.variance / self.returns.variance
