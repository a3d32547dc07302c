"""Losses on pairs of a chosen and a rejected response."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_ray.algorithms.checks import check_vectors


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Negative log-likelihood that the chosen response wins, given the scores of both.

        loss = -log sigmoid(chosen - rejected)

    Sources: Bradley and Terry 1952, "Rank Analysis of Incomplete Block Designs", Biometrika 39; as the loss of a reward
    model: Ouyang et al. 2022, arXiv:2203.02155, equation 1.

    Args:
        chosen: scores of the preferred responses, `[pairs]`.
        rejected: scores of the other responses, `[pairs]`.

    Returns:
        `[pairs]`, at least 0, log 2 where the scores are equal; finite for any finite difference.

    Raises:
        TensorInputError: the shapes differ, or are not `[pairs]`.
    """
    check_vectors(chosen=chosen, rejected=rejected)
    return -logsigmoid(chosen - rejected)
