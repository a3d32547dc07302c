"""What takes the place of the log-ratio in DPO when another divergence than the reverse KL holds the policy back."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_ray.algorithms.checks import check_option, check_vectors
from rlhf_ray.algorithms.errors import OptionError

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

MAX_EXPONENT = 30.0
"""Largest exponent of u^-1 and u^-α. e^30 is 1e13: a gradient's norm squares that, and float32 ends at 3e38."""


def ratio_scores(log_ratios: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    """Scores f'(u) of the ratios u = π(y|x) / π_ref(y|x), up to constants that cancel in a margin.

        reverse_kl: log u                  DPO
        forward_kl: -1 / u
        js:         log(2u / (1 + u))
        alpha:      (1 - u^-α) / α         reverse_kl for α -> 0, forward_kl (plus 1) at α = 1

    The margin of an f-DPO loss is the score of the chosen minus that of the rejected answer, in place of that of the
    log-ratios. All scores rise with u, so losses keep the signs of their gradients.

    Source: Wang et al. 2023, "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
    Constraints", arXiv:2309.16240, table 1.

    Args:
        log_ratios: log u, `[pairs]` or `[rows]`.
        divergence: what holds the policy close to the reference.
        alpha: α, above 0 and at most 1; read by `alpha` only.

    Returns:
        Same shape. 1/u and u^-α are bounded by e^30, so below log u = -30 (for `alpha`: -30 / α) the score is constant
        and gives no gradient.

    Raises:
        TensorInputError: log_ratios is not one-dimensional and floating.
        OptionError: unknown divergence, or alpha out of range.
    """
    check_vectors(log_ratios=log_ratios)
    match divergence:
        case "reverse_kl":
            return log_ratios
        case "forward_kl":
            return -(-log_ratios).clamp(max=MAX_EXPONENT).exp()
        case "js":
            return math.log(2) + logsigmoid(log_ratios)
        case "alpha":
            check_option("alpha", alpha, 0 < alpha <= 1, "above 0 and at most 1")
            # expm1, because 1 - u^-α cancels for the small α that come close to the reverse KL
            return -torch.expm1((-alpha * log_ratios).clamp(max=MAX_EXPONENT)) / alpha
        case _:
            raise OptionError("divergence", divergence, f"one of {', '.join(get_args(Divergence))}")
