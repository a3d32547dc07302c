"""Losses of single answers that are marked desirable or not: KTO and BCO, and what they compare rewards with."""

import math
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_ray.algorithms.checks import check_like, check_option, check_positive, check_vectors


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    kl: float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Prospect-theoretic loss: gains and losses count from a reference point and saturate (KTO).

        loss = λ_D · (1 - σ(β · (log-ratio - z)))    desirable
        loss = λ_U · (1 - σ(β · (z - log-ratio)))    undesirable

    Descent raises the log-prob of desirable and lowers that of undesirable answers.

    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv:2402.01306,
    equation 8.

    Args:
        log_ratios: `[rows]`.
        desirable: bool `[rows]`.
        kl: z, the estimate of KL(π || π_ref) by `kto_kl` over the whole optimizer step; finite, at least 0.
        beta: β, above 0.
        desirable_weight: λ_D, at least 0.
        undesirable_weight: λ_U, at least 0.

    Returns:
        `[rows]`, from 0 to the row's λ; half of it where the log-ratio is z.

    Raises:
        TensorInputError: shapes or dtypes do not fit.
        OptionError: an option out of range, or kl negative or not finite.
    """
    check_vectors(log_ratios=log_ratios)
    check_like("desirable", desirable, log_ratios, torch.bool)
    check_positive("beta", beta)
    check_option("kl", kl, 0 <= kl < math.inf, "finite and at least 0, as kto_kl gives it")
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        check_option(name, weight, 0 <= weight < math.inf, "finite and at least 0")
    gains = beta * (log_ratios - kl)
    # σ(-x), because 1 - σ(x) rounds to 0 long before it is
    return torch.where(desirable, desirable_weight * (-gains).sigmoid(), undesirable_weight * gains.sigmoid())


def kto_kl(mismatched_log_ratio_sum: float, rows: float) -> float:
    """KTO's reference point: mean log-ratio of answers put to the prompts of other rows, at least 0.

        z = max(0, Σ log-ratio(x_i, y_j) / rows)    j ≠ i

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, the shared, biased estimate of the KL.

    Args:
        mismatched_log_ratio_sum: over the whole optimizer step, all ranks and micro-batches.
        rows: how many log-ratios were summed, above 0.

    Returns:
        In nats; NaN stays NaN, which `kto_loss` refuses.

    Raises:
        OptionError: rows is not above 0.
    """
    check_positive("rows", rows)
    mean = mismatched_log_ratio_sum / rows
    return 0.0 if mean < 0 else mean


def bco_loss(log_ratios: Tensor, desirable: Tensor, shift: float, beta: float) -> Tensor:
    """Binary classification with the shifted reward as the logit (BCO).

        loss = -log σ(β · log-ratio - δ)       desirable
        loss = -log σ(-(β · log-ratio - δ))    undesirable

    Descent raises the log-prob of desirable and lowers that of undesirable answers.

    Source: Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment", arXiv:2404.04656,
    with its reward shift; its weights for prompts that differ between both kinds are left out.

    Args:
        log_ratios: `[rows]`.
        desirable: bool `[rows]`.
        shift: δ, in units of the reward β · log-ratio, from `RewardShift`; finite.
        beta: β, above 0.

    Returns:
        `[rows]`, at least 0; log 2 where the reward is δ.

    Raises:
        TensorInputError: shapes or dtypes do not fit.
        OptionError: beta out of range, or shift not finite.
    """
    check_vectors(log_ratios=log_ratios)
    check_like("desirable", desirable, log_ratios, torch.bool)
    check_positive("beta", beta)
    check_option("shift", shift, math.isfinite(shift), "finite")
    logits = beta * log_ratios - shift
    return -logsigmoid(torch.where(desirable, logits, -logits))


class RewardShiftState(TypedDict):
    """What a checkpoint keeps of a `RewardShift`."""

    desirable_sum: float
    desirable_count: float
    undesirable_sum: float
    undesirable_count: float


class RewardShift:
    """BCO's running δ over all rows seen so far.

        δ = (mean reward of desirable rows + mean reward of undesirable rows) / 2

    The mean of a kind that was not seen yet counts as 0, the reward of every answer before training; so δ starts at 0,
    and is half the mean of the only kind seen. Sums and counts are kept, so that ranks and steps in any split give the
    δ of one update with everything, but for the rounding of float64 sums.

    Source: Jung et al. 2024, arXiv:2404.04656, the reward shift.
    """

    def __init__(self) -> None:
        self._seen = RewardShiftState(
            desirable_sum=0.0, desirable_count=0.0, undesirable_sum=0.0, undesirable_count=0.0
        )

    def update(
        self, desirable_sum: float, desirable_count: float, undesirable_sum: float, undesirable_count: float
    ) -> None:
        """Take in rewards, given as their sums and numbers per kind; nothing changes when it raises.

        Raises:
            OptionError: a sum is not finite, or not 0 where there are no rows; a count is negative or not finite.
        """
        for kind, total, count in (
            ("desirable", desirable_sum, desirable_count),
            ("undesirable", undesirable_sum, undesirable_count),
        ):
            check_option(f"{kind}_count", count, 0 <= count < math.inf, "finite and at least 0")
            check_option(f"{kind}_sum", total, math.isfinite(total), "finite")
            check_option(f"{kind}_sum", total, total == 0 or count > 0, f"0, because {kind}_count is 0")
        self._seen["desirable_sum"] += desirable_sum
        self._seen["desirable_count"] += desirable_count
        self._seen["undesirable_sum"] += undesirable_sum
        self._seen["undesirable_count"] += undesirable_count

    @property
    def value(self) -> float:
        """δ, in units of the reward."""
        seen = self._seen
        desirable = seen["desirable_sum"] / seen["desirable_count"] if seen["desirable_count"] else 0.0
        undesirable = seen["undesirable_sum"] / seen["undesirable_count"] if seen["undesirable_count"] else 0.0
        return (desirable + undesirable) / 2

    def state_dict(self) -> RewardShiftState:
        """Four floats, exact through JSON."""
        return self._seen.copy()

    def load_state_dict(self, state: RewardShiftState) -> None:
        """Continue from `state`."""
        self._seen = state.copy()
