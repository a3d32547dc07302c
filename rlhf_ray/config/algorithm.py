"""Policy-gradient algorithms with a KL penalty in the reward: an advantage estimator and a policy loss."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.base import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from rlhf_ray.config.plugs import ESTIMATORS, POLICY_LOSSES, Estimator, PolicyLoss, choose


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
    advantage: str = "gae"
    """Advantage estimator: `gae` (with a critic), `grpo` or `rloo` (samples of a prompt against each other, without a
    critic), or `package.module:NAME` of an `Estimator`."""
    policy_loss: str = "clipped"
    """Policy loss: `clipped`, or `package.module:NAME` of a `PolicyLoss`."""
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
    """Shift and scale the advantages of the whole batch to mean 0 and deviation 1. By default only with `gae`."""
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

    @property
    def estimator(self) -> Estimator:
        """What `advantage` names."""
        return choose(".advantage", self.advantage, ESTIMATORS, Estimator)

    @property
    def loss(self) -> PolicyLoss:
        """What `policy_loss` names."""
        return choose(".policy_loss", self.policy_loss, POLICY_LOSSES, PolicyLoss)

    @model_validator(mode="before")
    @classmethod
    def _whitened_as_the_estimator_says(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "whiten_advantages" not in raw and isinstance(raw.get("advantage"), str):
            estimator = choose(".advantage", raw["advantage"], ESTIMATORS, Estimator)
            return raw | {"whiten_advantages": estimator.whitened}
        return raw

    @model_validator(mode="after")
    def _plugs_are_there(self) -> "PPO":
        _ = self.loss
        if not self.estimator.per_token:
            self._refuse_unread("gamma", "gae_lambda", of="it takes the return of a whole sample")
        if not self.estimator.values:
            self._refuse_unread("value_clip", "critic_warmup_steps", of="it has no critic")
        return self

    def _refuse_unread(self, *keys: str, of: str) -> None:
        for key in keys:
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                raise ValueError(f".{key} ({value}) has no effect with .advantage: {self.advantage}: {of}")
