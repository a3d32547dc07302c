"""KL between policy and reference: estimates per token, and the controller of its coefficient β."""

import math
from typing import Literal, TypedDict

import torch
from torch import Tensor

from rlhf_ray.algorithms.checks import check_option, check_vectors
from rlhf_ray.algorithms.errors import OptionError

KLEstimator = Literal["k1", "k2", "k3"]

# Ziegler et al. 2019, section 2.2: the proportional error is clipped to this.
MAX_RELATIVE_ERROR = 0.2


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate KL(p || r) at every token that was sampled from p.

    With d = log r - log p (p: the policy that sampled, r: the reference):

        k1 = -d                  unbiased, high variance, negative at single tokens
        k2 = d^2 / 2             biased, low variance, never negative
        k3 = exp(d) - 1 - d      unbiased, low variance, never negative

    Source: Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs: log p of the sampled tokens, `[tokens]`, in nats.
        reference_logprobs: log r of the same tokens, `[tokens]`.
        estimator: which of the three.

    Returns:
        `[tokens]`, nats. k3 overflows float32 where d > 88; it is not clamped, so that a finite check sees it.

    Raises:
        TensorInputError: the shapes differ, or are not `[tokens]`.
        OptionError: unknown estimator.
    """
    check_vectors(logprobs=logprobs, reference_logprobs=reference_logprobs)
    d = reference_logprobs - logprobs
    match estimator:
        case "k1":
            return -d
        case "k2":
            return d.square() / 2
        case "k3":
            # exp(d) - 1 would round a small KL away
            return torch.expm1(d) - d
        case _:
            raise OptionError("estimator", estimator, "k1, k2 or k3")


class KLControllerState(TypedDict):
    """What a checkpoint keeps of a `KLController`."""

    coef: float


class KLController:
    """The coefficient β of the KL term: fixed, or adapted so that the KL per sample approaches a target.

    After a step with `samples` samples whose KL per sample has the mean KL:

        e = clip((KL - target) / target, -0.2, 0.2)
        β <- β · (1 + e · samples / horizon)

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593, section 2.2,
    with the gain K_β = samples / horizon of its released code.

    Args:
        coef: β at the start; at least 0, above 0 when it is adapted (0 would never change).
        target: wanted KL per sample, summed over its response tokens, in nats. None: β is fixed.
        horizon: samples over which β may change by the clipped error. None: β is fixed.

    Raises:
        OptionError: a value out of range, or only one of target and horizon given.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: float | None = None) -> None:
        check_option("coef", coef, 0 <= coef < math.inf, "finite and at least 0")
        if (target is None) != (horizon is None):
            missing, given = ("horizon", "target") if horizon is None else ("target", "horizon")
            raise OptionError(missing, None, f"a number, because {given} is given")
        if target is not None and horizon is not None:
            check_option("target", target, 0 < target < math.inf, "finite and above 0")
            check_option("horizon", horizon, 0 < horizon < math.inf, "finite and above 0")
            check_option("coef", coef, coef > 0, "above 0 when target and horizon adapt it")
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl_per_sample_mean: float, samples: int) -> None:
        """Adapt β after a step; nothing happens when β is fixed.

        Args:
            kl_per_sample_mean: mean over samples of the KL summed over response tokens, in nats.
            samples: number of samples of this step.

        Raises:
            OptionError: the KL is not finite, or the horizon is so short that β could reach 0 or below.
        """
        if self.target is None or self.horizon is None:
            return
        check_option("kl_per_sample_mean", kl_per_sample_mean, math.isfinite(kl_per_sample_mean), "finite")
        check_option("samples", samples, samples > 0, "above 0")
        shortest = MAX_RELATIVE_ERROR * samples
        check_option("horizon", self.horizon, self.horizon > shortest, f"above {shortest} for {samples} samples a step")
        error = (kl_per_sample_mean - self.target) / self.target
        error = min(max(error, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        self.coef *= 1 + error * samples / self.horizon

    def state_dict(self) -> KLControllerState:
        """β; target and horizon belong to the config."""
        return {"coef": self.coef}

    def load_state_dict(self, state: KLControllerState) -> None:
        """Continue with the β of `state`, whatever `coef` was at construction."""
        check_option("coef", state["coef"], 0 <= state["coef"] < math.inf, "finite and at least 0")
        self.coef = state["coef"]
