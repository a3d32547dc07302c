"""Alignment via optimal transport (AOT): quantiles of a whole batch are compared, not the answers of a pair.

Sorting couples all rows, so the vectors have to be those of a whole optimizer step: losses of its parts do not add up
to the loss of the step.
"""

from torch import Tensor

from rlhf_ray.algorithms.checks import check_vectors
from rlhf_ray.algorithms.preference.margin import sigmoid_loss


def aot_paired_loss(
    policy_margins: Tensor, reference_margins: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """The policy's margins are to dominate the reference's, quantile by quantile.

        loss_i = -(1 - ε) · log σ(β·d_i) - ε · log σ(-β·d_i)
        d_i = policy margin i - the reference margin that has the same place in ascending order

    With equal orders in both vectors it is DPO. With ε = 0 descent raises the chosen and lowers the rejected log-prob.

    Source: Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport", arXiv:2406.05882,
    the paired variant with hard sorting and the logistic loss.

    Args:
        policy_margins: log π(y_w|x) - log π(y_l|x), `[pairs]`, all pairs of the optimizer step.
        reference_margins: the same under the reference, `[pairs]`.
        beta: β, above 0.
        label_smoothing: ε, in [0, 0.5].

    Returns:
        `[pairs]`, in the order of policy_margins. Their sum is the loss of the batch; a single loss depends on all
        reference margins and on the rank of its own, but its gradient reaches its own policy margin alone.

    Raises:
        TensorInputError: the shapes differ, or are not `[pairs]`.
        OptionError: an option out of range.
    """
    check_vectors(policy_margins=policy_margins, reference_margins=reference_margins)
    return sigmoid_loss(policy_margins - _of_equal_rank(policy_margins, reference_margins), beta, label_smoothing)


def aot_unpaired_loss(
    chosen_ratios: Tensor, rejected_ratios: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """The chosen log-ratios are to dominate the rejected ones, quantile by quantile, whatever their prompts.

        loss_i = -(1 - ε) · log σ(β·d_i) - ε · log σ(-β·d_i)
        d_i = chosen log-ratio i - the rejected log-ratio that has the same place in ascending order

    With ε = 0 descent raises the chosen and lowers the rejected log-prob.

    Source: Melnyk et al. 2024, arXiv:2406.05882, the unpaired variant with hard sorting and the logistic loss.

    Args:
        chosen_ratios: log-ratios of the chosen answers, `[pairs]`, all of the optimizer step.
        rejected_ratios: the same of the rejected answers, as many but in any order, `[pairs]`.
        beta: β, above 0.
        label_smoothing: ε, in [0, 0.5].

    Returns:
        `[pairs]`, in the order of chosen_ratios. Their sum is the loss of the batch; the gradient of a single loss
        reaches the rejected log-ratio of another row.

    Raises:
        TensorInputError: the shapes differ, or are not `[pairs]`.
        OptionError: an option out of range.
    """
    check_vectors(chosen_ratios=chosen_ratios, rejected_ratios=rejected_ratios)
    return sigmoid_loss(chosen_ratios - _of_equal_rank(chosen_ratios, rejected_ratios), beta, label_smoothing)


def _of_equal_rank(values: Tensor, others: Tensor) -> Tensor:
    """For each value, the one among others that has the same place in ascending order; differentiable in others."""
    ranks = values.argsort(stable=True).argsort()
    return others.sort(stable=True).values[ranks]
