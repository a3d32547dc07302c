"""Losses that see both log-ratios and not only their difference: NCA, SPPO and APO."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_ray.algorithms.checks import check_positive, check_vectors


def nca_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, beta: float) -> Tensor:
    """Tells each answer from samples of the reference, so that the chosen log-prob does not fall with the rejected.

        loss = -log σ(r_w) - 1/2 · log σ(-r_w) - 1/2 · log σ(-r_l),    r = β · log-ratio

    Descent lowers the rejected log-prob. It raises the chosen one up to the reward r_w = log 2 and lowers it beyond.

    Source: Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit Rewards",
    arXiv:2402.05369, NCA for pairs (two answers, the chosen one with reward weight 1).

    Args:
        chosen_ratios: log-ratios of the chosen answers, `[pairs]`.
        rejected_ratios: the same of the rejected answers, `[pairs]`.
        beta: β, above 0.

    Returns:
        `[pairs]`, above 0; 2 · log 2 where both log-ratios are 0.

    Raises:
        TensorInputError: the shapes differ, or are not `[pairs]`.
        OptionError: beta out of range.
    """
    chosen, rejected = _rewards(chosen_ratios, rejected_ratios, beta)
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


def sppo_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, beta: float) -> Tensor:
    """Squared distance of both log-ratios from their targets in the self-play game, with hard labels (SPPO).

        loss = (log-ratio_w - 1 / (2β))² + (log-ratio_l + 1 / (2β))²

    The paper's target is η · (P(y beats π) - 1/2); here η = 1/β and P is 1 for the chosen, 0 for the rejected answer.
    Descent raises the chosen and lowers the rejected log-prob up to the targets and does the opposite beyond them.

    Source: Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment", arXiv:2405.00675,
    equation 4.7.

    Args:
        chosen_ratios: log-ratios of the chosen answers, `[pairs]`.
        rejected_ratios: the same of the rejected answers, `[pairs]`.
        beta: β, above 0.

    Returns:
        `[pairs]`, at least 0; 1 / (2β²) where both log-ratios are 0.

    Raises:
        TensorInputError: the shapes differ, or are not `[pairs]`.
        OptionError: beta out of range.
    """
    check_vectors(chosen_ratios=chosen_ratios, rejected_ratios=rejected_ratios)
    check_positive("beta", beta)
    target = 1 / (2 * beta)
    return (chosen_ratios - target).square() + (rejected_ratios + target).square()


def apo_zero_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, beta: float) -> Tensor:
    """Each answer against the reference: for chosen answers that are better than the policy's own (APO-zero).

        loss = 1 - σ(r_w) + σ(r_l),    r = β · log-ratio

    Descent raises the chosen and lowers the rejected log-prob.

    Source: D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions", arXiv:2408.06266,
    equation 7.

    Args:
        chosen_ratios: log-ratios of the chosen answers, `[pairs]`.
        rejected_ratios: the same of the rejected answers, `[pairs]`.
        beta: β, above 0.

    Returns:
        `[pairs]` in [0, 2]; 1 where both log-ratios are equal.

    Raises:
        TensorInputError: the shapes differ, or are not `[pairs]`.
        OptionError: beta out of range.
    """
    chosen, rejected = _rewards(chosen_ratios, rejected_ratios, beta)
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, beta: float) -> Tensor:
    """Lowers both answers, the rejected one more: for chosen answers that are worse than the policy's own (APO-down).

        loss = σ(r_w) + 1 - σ(r_w - r_l),    r = β · log-ratio

    Descent lowers the rejected log-prob. It lowers the chosen one where |r_w| < |r_w - r_l|, else it raises it.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8.

    Args:
        chosen_ratios: log-ratios of the chosen answers, `[pairs]`.
        rejected_ratios: the same of the rejected answers, `[pairs]`.
        beta: β, above 0.

    Returns:
        `[pairs]` in [0, 2]; 1 where both log-ratios are 0.

    Raises:
        TensorInputError: the shapes differ, or are not `[pairs]`.
        OptionError: beta out of range.
    """
    chosen, rejected = _rewards(chosen_ratios, rejected_ratios, beta)
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


def _rewards(chosen_ratios: Tensor, rejected_ratios: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    check_vectors(chosen_ratios=chosen_ratios, rejected_ratios=rejected_ratios)
    check_positive("beta", beta)
    return beta * chosen_ratios, beta * rejected_ratios
