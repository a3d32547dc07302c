"""Losses that look at all candidates of a row at once."""

import torch
from torch import Tensor

from rlhf_ray.algorithms.reward_model.rows import as_matrices


def softmax_loss(scores: Tensor, ranks: Tensor, offsets: Tensor) -> Tensor:
    """Negative log-likelihood that the best of k candidates is chosen.

        loss = -log (exp(s_best) / Σ_j exp(s_j))

    Of several best, the mean of their losses. For k = 2 this is the Bradley–Terry loss, with its ties.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593, equation 1.

    Args:
        scores: `[candidates]`.
        ranks: int64 `[candidates]`; only which are the lowest of their row counts.
        offsets: int64 `[rows + 1]`.

    Returns:
        `[rows]`, at least 0, log k where all scores are equal.

    Raises:
        TensorInputError: a tensor is not as described.
        SampleError: a row has fewer than two candidates.
    """
    score, rank, inside = as_matrices(scores, ranks, offsets)
    if not len(score):
        return scores.new_zeros(0)
    log_p = score.masked_fill(~inside, -torch.inf).log_softmax(1)
    best = inside & (rank == rank.amin(1, keepdim=True))
    return -torch.where(best, log_p, 0).sum(1) / best.sum(1)


def plackett_luce_loss(scores: Tensor, ranks: Tensor, offsets: Tensor) -> Tensor:
    """Negative log-likelihood of a ranking: the best is chosen of all, the second of the rest, and so on.

        loss = Σ_i (log Σ_{j: rank_j ≥ rank_i} exp(s_j) - s_i)

    Ties enter by Breslow's approximation: each of several candidates of a rank counts as chosen from all of its rank
    and below, its equals included. A tied row of two therefore costs twice the Bradley–Terry loss of a tie. Candidates
    that share the last rank are ties as well: they are said to be equal, not left unranked.

    Sources: Plackett 1975, "The Analysis of Permutations", Applied Statistics 24; Luce 1959, "Individual Choice
    Behavior"; ties: Breslow 1974, "Covariance Analysis of Censored Survival Data", Biometrics 30.

    Args:
        scores: `[candidates]`.
        ranks: int64 `[candidates]`, 0 for the best of a row.
        offsets: int64 `[rows + 1]`.

    Returns:
        `[rows]`, at least 0; for two candidates without a tie the Bradley–Terry loss.

    Raises:
        TensorInputError: a tensor is not as described.
        SampleError: a row has fewer than two candidates.
    """
    score, rank, inside = as_matrices(scores, ranks, offsets)
    if not len(score):
        return scores.new_zeros(0)
    # [rows, i, j]: j can still be chosen when i is.
    remaining = inside[:, None, :] & (rank[:, None, :] >= rank[:, :, None])
    normaliser = torch.where(remaining, score[:, None, :], -torch.inf).logsumexp(2)
    return torch.where(inside, normaliser - score, 0).sum(1)
