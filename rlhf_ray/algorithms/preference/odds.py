"""Terms of losses that need no reference model: the odds ratio of ORPO and the negative log-likelihood."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_ray.algorithms.checks import check_lengths, check_vectors
from rlhf_ray.algorithms.errors import TensorInputError

MAX_MEAN = -1e-12
"""Nearest to 0 that a mean log-prob counts as: odds and their gradients stay below 1e12, which float32 can square."""


def odds_ratio_loss(chosen_means: Tensor, rejected_means: Tensor) -> Tensor:
    """Logistic loss of the log odds ratio of both answers, ORPO's second term.

        loss = -log σ(log odds_w - log odds_l)
        log odds = mean - log(1 - exp(mean))

    Descent raises the chosen and lowers the rejected log-prob.

    Source: Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", arXiv:2403.07691,
    equation 7, the odds from the log-prob per token.

    Args:
        chosen_means: log-prob per token of the chosen answers, at most 0, `[pairs]`.
        rejected_means: the same of the rejected answers, `[pairs]`.

    Returns:
        `[pairs]`, at least 0; log 2 where the means are equal. Means above -1e-12 count as -1e-12, where the odds would
        grow without bound, and give no gradient.

    Raises:
        TensorInputError: the shapes differ, or are not `[pairs]`.
    """
    check_vectors(chosen_means=chosen_means, rejected_means=rejected_means)
    return -logsigmoid(_log_odds(chosen_means) - _log_odds(rejected_means))


def nll_loss(logprobs: Tensor, lengths: Tensor) -> Tensor:
    """Negative log-likelihood per token of each answer.

        loss = -log π(y|x) / |y|

    On the chosen answers it is the second term of RPO (Pang et al. 2024, "Iterative Reasoning Preference
    Optimization", arXiv:2404.19733, equation 1), the first of ORPO (Hong et al. 2024, arXiv:2403.07691, equation 6) and
    the second of CPO (Xu et al. 2024, "Contrastive Preference Optimization", arXiv:2401.08417; not divided there).

    Args:
        logprobs: `[answers]`.
        lengths: tokens of each answer, int64 `[answers]`, at least 1 each.

    Returns:
        `[answers]`, at least 0, in nats per token.

    Raises:
        TensorInputError: shapes or dtypes do not fit.
        SampleError: an answer is empty.
    """
    check_vectors(logprobs=logprobs)
    check_lengths(lengths)
    if lengths.shape != logprobs.shape:
        raise TensorInputError("lengths", f"shape {tuple(lengths.shape)}", f"shape {tuple(logprobs.shape)}")
    return -logprobs / lengths


def _log_odds(means: Tensor) -> Tensor:
    means = means.clamp(max=MAX_MEAN)
    # expm1 keeps 1 - exp(mean) exact near 0; far below 0 the logarithm of its rounding is small beside the mean.
    return means - torch.log(-torch.expm1(means))
