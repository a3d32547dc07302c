"""Proximal policy optimisation with a KL penalty in the reward."""

from typing import Annotated, Literal

from pydantic import Field

from rlhf_ray.config.base import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class KL(Section):
    """The per-token penalty for leaving the reference model."""

    coef: NonNegativeFloat = 0.05
    """β, or its start when it adapts."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the divergence from one sample (Schulman, "Approximating KL divergence")."""
    target: PositiveFloat | None = None
    """KL per response, in nats, that β is steered to (Ziegler et al. 2019). None keeps β fixed."""
    horizon: PositiveInt = 10_000
    """Samples over which an adaptive β reacts. Without effect while β is fixed."""


class PPO(Section):
    """The algorithm."""

    kl: KL = KL()
    """Penalty for leaving the reference."""
    gamma: Fraction = 1.0
    """Discount per token."""
    gae_lambda: Fraction = 0.95
    """λ of generalised advantage estimation."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clip of the probability ratio, at 1 − clip."""
    clip_high: PositiveFloat | None = None
    """Upper clip, at 1 + clip_high; by default the same as `clip`."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the loss of negative advantages, as a multiple of the advantage (Ye et al. 2020)."""
    value_clip: PositiveFloat | None = 0.2
    """How far a value may move from the old value before its loss is clipped. None does not clip."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    epochs: PositiveInt = 1
    """Passes over each batch."""
    optimizer_steps: PositiveInt = 1
    """Optimizer steps in each pass; the batch is split into so many parts, shuffled anew each pass."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of the whole batch to mean 0 and deviation 1."""
    loss_mean: Literal["token", "sample"] = "token"
    """Average the loss over all tokens of an optimizer step, or over samples after a mean over each one's tokens."""
    score_clip: PositiveFloat | None = None
    """Bound on the absolute score of a sample, after normalisation."""
    normalise_scores: bool = False
    """Subtract the running mean of scores and divide by their running deviation."""
    truncation_penalty: NonNegativeFloat = 0.0
    """Subtracted from the score of a response that was cut at `max_new_tokens`."""
    critic_warmup_steps: NonNegativeInt = 0
    """First steps in which only the critic learns."""
    kl_early_stop: PositiveFloat | None = None
    """Approximate KL (nats per token) to the sampling policy, measured in an optimizer step, after which no
    further step is made on the batch."""
