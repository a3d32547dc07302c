"""The clipped policy loss of PPO, per token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.algorithms.checks import check_option, check_vectors


@dataclass(frozen=True)
class PolicyLossInputs:
    """Flat tensors `[tokens]`, float32 or wider; gradients flow through logprobs and entropy only.

    Attributes:
        logprobs: log-prob of each sampled token under the policy in training.
        old_logprobs: the same under the policy that the ratio is taken against.
        advantages: A per token.
        entropy: entropy of the policy's next-token distribution, in nats.
        engine_logprobs, reference_logprobs: for losses that ask for them (`PolicyLoss.columns`), else None.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    entropy: Tensor
    engine_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None


@dataclass(frozen=True)
class PolicyLossOptions:
    """What a config says of the loss.

    Attributes:
        clip_low: in [0, 1].
        clip_high: at least 0.
        dual_clip: above 1 (Ye et al. use 3), or None.
        entropy_coef: weight of the bonus; at 0 the entropy is left out of the graph.
    """

    clip_low: float
    clip_high: float
    dual_clip: float | None = None
    entropy_coef: float = 0.0


@dataclass(frozen=True)
class PolicyLossOutput:
    """Flat tensors `[tokens]`; all but loss are detached.

    Attributes:
        loss: to be minimised, entropy bonus included; aggregate with `aggregation.token_weights`.
        clipped: 1.0 where a clip (low, high or dual) binds, so that the advantage gives no gradient; else 0.0.
        ratio: exp(logprobs - old_logprobs).
        approx_kl: k3 estimate of KL(old || new), (ratio - 1) - log ratio.
    """

    loss: Tensor
    clipped: Tensor
    ratio: Tensor
    approx_kl: Tensor


def clipped_policy_loss(inputs: PolicyLossInputs, options: PolicyLossOptions) -> PolicyLossOutput:
    """Clipped surrogate of PPO with separate bounds, optional dual clip, and entropy bonus.

        r = exp(logprobs - old_logprobs)
        J = min(r · A, clip(r, 1 - clip_low, 1 + clip_high) · A)
        J = max(J, dual_clip · A)    where A < 0, when dual_clip is given
        loss = -J - entropy_coef · entropy

    Sources: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv:1707.06347, equations 7 and 9;
    separate bounds: Yu et al. 2025, "DAPO", arXiv:2503.14476, section 3.1; dual clip: Ye et al. 2020, "Mastering
    Complex Control in MOBA Games with Deep Reinforcement Learning", arXiv:1912.09729, "Dual-clip PPO".

    Args:
        inputs: `[tokens]` each.
        options: bounds of the ratio, and weight of the bonus.

    Returns:
        Values per token. A log-ratio above 88 overflows float32; it is not clamped, so that a finite check sees it.

    Raises:
        TensorInputError: the shapes differ, or are not `[tokens]`.
        OptionError: a bound out of range.
    """
    check_vectors(
        logprobs=inputs.logprobs,
        old_logprobs=inputs.old_logprobs,
        advantages=inputs.advantages,
        entropy=inputs.entropy,
    )
    clip_low, clip_high, dual_clip = options.clip_low, options.clip_high, options.dual_clip
    check_option("clip_low", clip_low, 0 <= clip_low <= 1, "in [0, 1]")
    check_option("clip_high", clip_high, clip_high >= 0, "at least 0")

    advantages = inputs.advantages.detach()
    log_ratio = inputs.logprobs - inputs.old_logprobs.detach()
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(unclipped, bounded)
    clipped = bounded < unclipped
    if dual_clip is not None:
        check_option("dual_clip", dual_clip, dual_clip > 1, "above 1, or None")
        floor = dual_clip * advantages
        floored = (advantages < 0) & (floor > objective)
        objective = torch.where(floored, floor, objective)
        clipped = clipped | floored
    loss = -objective
    if options.entropy_coef != 0:
        loss = loss - options.entropy_coef * inputs.entropy

    log_ratio = log_ratio.detach()
    return PolicyLossOutput(
        loss=loss,
        clipped=clipped.to(loss.dtype),
        ratio=ratio.detach(),
        approx_kl=torch.expm1(log_ratio) - log_ratio,
    )
