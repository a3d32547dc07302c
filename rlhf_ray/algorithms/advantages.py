"""From scores, KL and values to rewards per token, advantages and returns."""

import torch
from torch import Tensor

from rlhf_ray.algorithms.checks import check_option, check_vectors, lengths_from_offsets
from rlhf_ray.algorithms.errors import TensorInputError


def shaped_rewards(scores: Tensor, kl: Tensor, offsets: Tensor, kl_coef: float) -> Tensor:
    """Reward of every token: -β · KL, and the sample's score on its last token.

        r_t = -β · kl_t + [t is the last token] · score

    Source: Ziegler et al. 2019, arXiv:1909.08593, equation 2, spread over tokens as in Ouyang et al. 2022,
    arXiv:2203.02155, section 3.5.

    Args:
        scores: `[samples]`.
        kl: KL estimate per token, `[tokens]`.
        offsets: int64 `[samples + 1]`.
        kl_coef: β.

    Returns:
        `[tokens]`, in the wider dtype of scores and kl.

    Raises:
        TensorInputError: shapes or offsets do not fit together.
        SampleError: a sample has no token that could carry its score.
    """
    check_vectors(scores=scores)
    check_vectors(kl=kl)
    lengths = lengths_from_offsets(offsets, kl.numel())
    if lengths.numel() != scores.numel():
        raise TensorInputError("scores", f"length {scores.numel()}", f"length {lengths.numel()}, as offsets")
    dtype = torch.promote_types(scores.dtype, kl.dtype)
    return (-kl_coef * kl.to(dtype)).index_add(0, offsets[1:] - 1, scores.to(dtype))


def gae(rewards: Tensor, values: Tensor, offsets: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that the critic learns.

        delta_t = r_t + gamma · V_{t+1} - V_t        with V = 0 after the last token of a sample
        A_t     = delta_t + gamma · lam · A_{t+1}    with A = 0 after the last token of a sample
        R_t     = A_t + V_t

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    arXiv:1506.02438, equations 16 to 18.

    Computed in float64. The loop runs over the positions of the longest sample and touches every token once.

    Args:
        rewards: `[tokens]`.
        values: V before each token, `[tokens]`.
        offsets: int64 `[samples + 1]`.
        gamma: discount, in [0, 1].
        lam: λ, in [0, 1]; 1 gives Monte-Carlo returns, 0 gives one-step temporal differences.

    Returns:
        advantages `[tokens]` and returns `[tokens]`, without gradient, in the wider dtype of rewards and values.

    Raises:
        TensorInputError: shapes or offsets do not fit together.
        SampleError: a sample is empty.
        OptionError: gamma or lam out of [0, 1].
    """
    check_vectors(rewards=rewards, values=values)
    check_option("gamma", gamma, 0 <= gamma <= 1, "in [0, 1]")
    check_option("lam", lam, 0 <= lam <= 1, "in [0, 1]")
    lengths = lengths_from_offsets(offsets, rewards.numel())
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    if lengths.numel() == 0:
        return rewards.new_zeros(0, dtype=dtype), rewards.new_zeros(0, dtype=dtype)

    v = values.detach().double()
    last = offsets[1:] - 1
    next_v = v.roll(-1).index_fill(0, last, 0.0)
    advantages = rewards.detach().double() + gamma * next_v - v

    # Longest first, so that the samples that reach back `step` tokens from their end are a prefix.
    ordered, order = lengths.sort(descending=True)
    position = last[order]
    reaching = torch.bincount(ordered).flip(0).cumsum(0).flip(0).tolist()  # reaching[n]: samples of length >= n
    for step in range(1, len(reaching) - 1):
        at = position[: reaching[step + 1]] - step
        advantages[at] += gamma * lam * advantages[at + 1]
    return advantages.to(dtype), (advantages + v).to(dtype)
