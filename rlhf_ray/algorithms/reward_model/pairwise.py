"""Losses that look at two candidates at a time."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_ray.algorithms.checks import check_like, check_vectors
from rlhf_ray.algorithms.reward_model.rows import candidate_pairs, check_scores


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, tied: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood that the chosen text wins, given the scores of both.

        ordered: loss = -log sigmoid(chosen - rejected - margin)
        tied:    loss = -1/2 log sigmoid(chosen - rejected) - 1/2 log sigmoid(rejected - chosen)

    A tie is a label of one half: the loss is least, log 2, where the scores are equal.

    Sources: Bradley and Terry 1952, "Rank Analysis of Incomplete Block Designs", Biometrika 39; as the loss of a reward
    model: Ouyang et al. 2022, arXiv:2203.02155, equation 1; margins: Touvron et al. 2023, "Llama 2", arXiv:2307.09288,
    equation 2.

    Args:
        chosen: scores of the preferred texts, `[pairs]`.
        rejected: scores of the other texts, `[pairs]`.
        margins: by how much the chosen text should score higher, `[pairs]`; None for 0. Not applied to ties.
        tied: bool `[pairs]`, neither was preferred; None when there are no ties.

    Returns:
        `[pairs]`, at least 0, log 2 where the scores are equal and the margin is 0; finite for any finite difference.

    Raises:
        TensorInputError: the shapes differ, or are not `[pairs]`.
    """
    check_vectors(chosen=chosen, rejected=rejected)
    difference = chosen - rejected
    ordered = difference
    if margins is not None:
        check_vectors(chosen=chosen, margins=margins)
        ordered = difference - margins
    if tied is None:
        return -logsigmoid(ordered)
    check_like("tied", tied, chosen, torch.bool)
    half = -(logsigmoid(difference) + logsigmoid(-difference)) / 2
    return torch.where(tied, half, -logsigmoid(ordered))


def centering_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """How far the scores of a pair are from 0 together; it fixes the constant that a comparison leaves open.

        penalty = (chosen + rejected)²

    Source: Eisenstein et al. 2023, "Helping or Herding?", arXiv:2312.09244, which adds it with a small factor.

    Args:
        chosen: scores of the preferred texts, `[pairs]`.
        rejected: scores of the other texts, `[pairs]`.

    Returns:
        `[pairs]`.

    Raises:
        TensorInputError: the shapes differ, or are not `[pairs]`.
    """
    check_vectors(chosen=chosen, rejected=rejected)
    return (chosen + rejected).square()


def all_pairs_loss(scores: Tensor, ranks: Tensor, offsets: Tensor) -> Tensor:
    """Mean of the Bradley–Terry losses of all pairs of a row, so that a row counts once however many pairs it has.

        loss = 1 / (k choose 2) · Σ over pairs -log sigmoid(better - worse)

    The pairs of a row share its forward passes and are always in one step. Two candidates of the same rank are a tie.

    Source: Ouyang et al. 2022, "InstructGPT", arXiv:2203.02155, equation 1.

    Args:
        scores: `[candidates]`.
        ranks: int64 `[candidates]`, 0 for the best of a row.
        offsets: int64 `[rows + 1]`.

    Returns:
        `[rows]`.

    Raises:
        TensorInputError: a tensor is not as described.
        SampleError: a row has fewer than two candidates.
    """
    pairs = candidate_pairs(ranks, offsets)
    check_scores(scores, ranks)
    losses = bradley_terry_loss(scores[pairs.better], scores[pairs.worse], tied=pairs.tied)
    lengths = offsets.diff()
    sums = losses.new_zeros(len(lengths)).index_add(0, pairs.rows, losses)
    return sums / (lengths * (lengths - 1) / 2).to(losses.dtype)
