"""Losses of a margin alone: DPO, its robust forms, SLiC and RSO's hinge, IPO, EXO, DiscoPOP and SimPO."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_ray.algorithms.checks import check_option, check_positive, check_vectors


def sigmoid_loss(margins: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Logistic loss of the margin (DPO), conservative where labels may be wrong (cDPO).

        loss = -(1 - ε) · log σ(β·m) - ε · log σ(-β·m)

    log 2 at margin 0. With ε = 0 descent raises the chosen and lowers the rejected log-prob; otherwise only up to
    σ(β·m) = 1 - ε, where the loss is least.

    Sources: Rafailov et al. 2023, "Direct Preference Optimization", arXiv:2305.18290, equation 7; label smoothing:
    Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO". Of margins of the policy's own
    log-probs it is the first term of CPO: Xu et al. 2024, arXiv:2401.08417.

    Args:
        margins: m, of log-ratios, `[pairs]`.
        beta: β, above 0.
        label_smoothing: ε, how probable a swapped label is, in [0, 0.5].

    Returns:
        `[pairs]`, at least 0.

    Raises:
        TensorInputError: margins is not `[pairs]`.
        OptionError: an option out of range.
    """
    check_option("label_smoothing", label_smoothing, 0 <= label_smoothing <= 0.5, "in [0, 0.5]")
    logits = _logits(margins, beta)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def robust_loss(margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO's loss without the bias that swapped labels bring (rDPO).

        loss = (-(1 - ε) · log σ(β·m) + ε · log σ(-β·m)) / (1 - 2ε)

    When labels are swapped with probability ε, its expectation is the DPO loss of the true labels. It falls without
    bound as the margin grows. Descent raises the chosen and lowers the rejected log-prob.

    Source: Chowdhury et al. 2024, "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
    arXiv:2403.00409.

    Args:
        margins: m, of log-ratios, `[pairs]`.
        beta: β, above 0.
        label_smoothing: ε, the share of swapped labels, in [0, 0.5).

    Returns:
        `[pairs]`, of either sign; log 2 at margin 0.

    Raises:
        TensorInputError: margins is not `[pairs]`.
        OptionError: an option out of range.
    """
    check_option("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "in [0, 0.5)")
    logits = _logits(margins, beta)
    biased = -(1 - label_smoothing) * logsigmoid(logits) + label_smoothing * logsigmoid(-logits)
    return biased / (1 - 2 * label_smoothing)


def hinge_loss(margins: Tensor, beta: float) -> Tensor:
    """Hinge loss of the margin; pairs beyond the margin 1/β give no gradient.

        loss = max(0, 1 - β·m)

    Descent raises the chosen and lowers the rejected log-prob.

    Sources: Zhao et al. 2023, "SLiC-HF", arXiv:2305.10425 (margins of the policy's own log-probs); Liu et al. 2023,
    "Statistical Rejection Sampling Improves Preference Optimization" (RSO), arXiv:2309.06657 (margins of log-ratios).

    Args:
        margins: m, `[pairs]`.
        beta: β, above 0.

    Returns:
        `[pairs]`, at least 0; 1 at margin 0.

    Raises:
        TensorInputError: margins is not `[pairs]`.
        OptionError: beta out of range.
    """
    return (1 - _logits(margins, beta)).relu()


def ipo_loss(margins: Tensor, tau: float) -> Tensor:
    """Squared distance of the margin from a target, so that certain pairs cannot drive the policy ever further (IPO).

        loss = (m - 1 / (2τ))²

    Descent raises the chosen and lowers the rejected log-prob up to the target, and does the opposite beyond it.

    Source: Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences",
    arXiv:2310.12036, equation 17.

    Args:
        margins: m, of log-ratios per token (divided by the length of their answer), as its authors use it; `[pairs]`.
        tau: τ, above 0.

    Returns:
        `[pairs]`, at least 0; 1 / (4τ²) at margin 0.

    Raises:
        TensorInputError: margins is not `[pairs]`.
        OptionError: tau out of range.
    """
    check_vectors(margins=margins)
    check_positive("tau", tau)
    return (margins - 1 / (2 * tau)).square()


def exo_loss(margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Reverse KL from the policy's preference to the smoothed one of the labels (EXO-pref).

        loss = σ(β·m) · (log σ(β·m) - log(1 - ε)) + σ(-β·m) · (log σ(-β·m) - log ε)

    Descent raises the chosen and lowers the rejected log-prob up to σ(β·m) = 1 - ε, where the loss is 0, and does the
    opposite beyond it. Badly wrong pairs give little gradient: the loss is bounded by -log ε.

    Source: Ji et al. 2024, "Towards Efficient Exact Optimization of Language Model Alignment", arXiv:2402.00856,
    equation 16 with two answers.

    Args:
        margins: m, of log-ratios, `[pairs]`.
        beta: β, above 0.
        label_smoothing: ε, in (0, 0.5); its authors use 1e-3.

    Returns:
        `[pairs]`, at least 0 but for rounding; -log 2 - 1/2 · log(ε · (1 - ε)) at margin 0.

    Raises:
        TensorInputError: margins is not `[pairs]`.
        OptionError: an option out of range.
    """
    check_option("label_smoothing", label_smoothing, 0 < label_smoothing < 0.5, "in (0, 0.5)")
    logits = _logits(margins, beta)
    chosen = logits.sigmoid() * (logsigmoid(logits) - math.log1p(-label_smoothing))
    rejected = (-logits).sigmoid() * (logsigmoid(-logits) - math.log(label_smoothing))
    return chosen + rejected


def discopop_loss(margins: Tensor, beta: float, tau: float = 0.05) -> Tensor:
    """Logistic loss where the margin is negative, exponential loss where it is positive, blended in between (DiscoPOP).

        s = σ(β·m / τ)
        loss = (1 - s) · -log σ(β·m) + s · exp(-β·m)

    The blend has a bump around margin 0: descent raises the chosen and lowers the rejected log-prob except on its left
    flank, where it does the opposite (for τ = 0.05: β·m from -0.12 to 0.07).

    Source: Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for Large Language Models",
    arXiv:2406.08414, equation 5, the log-ratio modulated loss.

    Args:
        margins: m, of log-ratios, `[pairs]`.
        beta: β, above 0.
        tau: τ, above 0 and at most 1: above 1 the exponential outgrows its weight for negative margins.

    Returns:
        `[pairs]`, at least 0; (1 + log 2) / 2 at margin 0.

    Raises:
        TensorInputError: margins is not `[pairs]`.
        OptionError: an option out of range.
    """
    check_option("tau", tau, 0 < tau <= 1, "above 0 and at most 1")
    logits = _logits(margins, beta)
    logistic = -(-logits / tau).sigmoid() * logsigmoid(logits)
    # With the weight inside the exponent nothing overflows: log s falls faster than -β·m grows.
    exponential = torch.exp(logsigmoid(logits / tau) - logits)
    return logistic + exponential


def simpo_loss(
    chosen_means: Tensor, rejected_means: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """Logistic loss of the policy's own log-probs per token, with a margin to reach; no reference (SimPO).

        loss = -(1 - ε) · log σ(z) - ε · log σ(-z),    z = β · (mean_w - mean_l) - γ

    With ε = 0 descent raises the chosen and lowers the rejected log-prob; otherwise only up to σ(z) = 1 - ε.

    Source: Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv:2405.14734,
    equation 6; ε is not of the paper.

    Args:
        chosen_means: log-prob per token of the chosen answers, `[pairs]`.
        rejected_means: the same of the rejected answers, `[pairs]`.
        beta: β, above 0.
        gamma: γ, the margin of rewards to reach, at least 0.
        label_smoothing: ε, in [0, 0.5].

    Returns:
        `[pairs]`, at least 0.

    Raises:
        TensorInputError: the shapes differ, or are not `[pairs]`.
        OptionError: an option out of range.
    """
    check_vectors(chosen_means=chosen_means, rejected_means=rejected_means)
    check_positive("beta", beta)
    check_option("gamma", gamma, 0 <= gamma < math.inf, "at least 0 and finite")
    return sigmoid_loss(beta * (chosen_means - rejected_means) - gamma, beta=1.0, label_smoothing=label_smoothing)


def _logits(margins: Tensor, beta: float) -> Tensor:
    check_vectors(margins=margins)
    check_positive("beta", beta)
    return beta * margins
