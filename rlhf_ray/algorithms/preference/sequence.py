"""From tokens to answers: sums, weights of tokens past the public length, and how on-policy an answer is."""

import torch
from torch import Tensor

from rlhf_ray.algorithms.checks import check_lengths, check_like, check_option, check_vectors
from rlhf_ray.algorithms.errors import SampleError, TensorInputError


def sum_by_answer(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum of the tokens' values of each answer; differentiable.

    Args:
        values: of the tokens of all answers, one answer after the other, `[tokens]`.
        lengths: tokens of each answer, int64 `[answers]`, at least 1 each. In host memory, nothing waits for a device.

    Returns:
        `[answers]`, dtype of values. The sum is taken in float64: its rounding is then too small for the order in which
        a GPU adds, or the answers beside it, to show.

    Raises:
        TensorInputError: a wrong shape or dtype, or the lengths do not add up to the tokens.
        SampleError: an answer is empty.
    """
    check_vectors(values=values)
    check_lengths(lengths)
    tokens = int(lengths.sum())
    if tokens != values.numel():
        raise TensorInputError("values", f"{values.numel()} tokens", f"{tokens}, the sum of lengths")
    answers = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths)
    answers = answers.to(values.device, non_blocking=True)
    sums = torch.zeros(lengths.numel(), dtype=torch.float64, device=values.device)
    return sums.index_add(0, answers, values.double()).to(values.dtype)


def length_desensitised_weights(lengths: Tensor, public_lengths: Tensor, alpha: float) -> Tensor:
    """Weights under which the part of an answer that only its length adds counts less (LD-DPO).

        w_t = 1        for the first `public length` tokens of the answer
        w_t = alpha    for the others

    The log-prob of the answer is then the sum of w_t · log p_t, for the policy and the reference alike. At alpha 1 it
    is the ordinary one; at 0 both answers of a pair are cut to the length of the shorter.

    Source: Liu et al. 2024, "Length Desensitization in Direct Preference Optimization", arXiv:2409.06411.

    Args:
        lengths: tokens of each answer, int64 `[answers]`, at least 1 each.
        public_lengths: the smaller length of the answer's pair, int64 `[answers]`.
        alpha: in [0, 1].

    Returns:
        float32 `[tokens]`.

    Raises:
        TensorInputError: a tensor is not int64 `[answers]`.
        SampleError: an answer is empty, or shorter than its public length.
        OptionError: alpha out of range.
    """
    check_lengths(lengths)
    check_like("public_lengths", public_lengths, lengths, torch.int64)
    wrong = torch.nonzero((public_lengths < 1) | (public_lengths > lengths)).flatten().tolist()
    if wrong:
        raise SampleError(wrong, "have no public length from 1 to their own", "give the smaller length of the pair")
    check_option("alpha", alpha, 0 <= alpha <= 1, "in [0, 1]")
    starts = lengths.cumsum(0) - lengths
    ends = (starts + public_lengths).repeat_interleave(lengths)
    public = torch.arange(ends.numel(), device=lengths.device) < ends
    return public.float() + alpha * (~public).float()


def sampled_alignment(logprobs: Tensor, collisions: Tensor, lengths: Tensor) -> Tensor:
    """How likely the policy finds an answer, measured against what it would sample itself (WPO).

        a(y) = 1/|y| · Σ_t (log p_t - log Σ_v p_v²)

    Σ_v p_v² is the mean probability of a sampled token, so an answer of the policy's own has about 0.

    Source: Zhou et al. 2024, "WPO: Enhancing RLHF with Weighted Preference Optimization", arXiv:2406.11827,
    "sampled alignment".

    Args:
        logprobs: log p_t of each token of the answers under the policy, `[tokens]`.
        collisions: log Σ_v p_v² over the vocabulary, of the distribution that the token was scored with, `[tokens]`.
        lengths: tokens of each answer, int64 `[answers]`, at least 1 each.

    Returns:
        `[answers]`, in nats.

    Raises:
        TensorInputError: shapes or dtypes do not fit.
        SampleError: an answer is empty.
    """
    check_vectors(logprobs=logprobs, collisions=collisions)
    return sum_by_answer(logprobs - collisions, lengths) / lengths.to(logprobs.device, non_blocking=True)


def wpo_weights(chosen_alignment: Tensor, rejected_alignment: Tensor) -> Tensor:
    """Weights of pairs by how on-policy both answers are; the loss of a pair is multiplied by its weight.

        w = min(1, exp(a(y_w) + a(y_l)))

    Source: Zhou et al. 2024, arXiv:2406.11827, equation 2 with sampled alignment; the bound of 1 is that of its code.

    Args:
        chosen_alignment: `sampled_alignment` of the chosen answers, `[pairs]`.
        rejected_alignment: the same of the rejected answers, `[pairs]`.

    Returns:
        `[pairs]` in [0, 1], detached.

    Raises:
        TensorInputError: the shapes differ, or are not `[pairs]`.
    """
    check_vectors(chosen_alignment=chosen_alignment, rejected_alignment=rejected_alignment)
    # Bounding the exponent, not its exponential, cannot overflow.
    return (chosen_alignment + rejected_alignment).detach().clamp(max=0).exp()
