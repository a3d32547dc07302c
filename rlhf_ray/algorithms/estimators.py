"""Advantage estimators: what an entry of `ESTIMATORS` (config/plugs.py) names.

An estimator of tokens turns rewards and values per token into advantages and returns; ranks that hold these columns
call it. An estimator of samples turns the return of each whole sample into one advantage for all of its tokens; the
controller calls it, since the samples of a prompt may lie in several shards.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.algorithms.advantages import gae
from rlhf_ray.algorithms.checks import check_like, check_vectors
from rlhf_ray.algorithms.errors import TensorInputError


@dataclass(frozen=True)
class TokenInputs:
    """What an estimator of tokens gets, of the tokens that are actions of the policy.

    Attributes:
        rewards: -β · KL, and the sample's score on its last token, `[tokens]`.
        offsets: int64 `[samples + 1]`.
        values: of the critic, `[tokens]`; None where no estimator asked for them.
        gamma, lam: discount, and λ of GAE.
    """

    rewards: Tensor
    offsets: Tensor
    values: Tensor | None
    gamma: float
    lam: float


@dataclass(frozen=True)
class TokenAdvantages:
    """What it gives.

    Attributes:
        advantages: `[tokens]`.
        returns: what the critic learns, `[tokens]`; None without a critic.
    """

    advantages: Tensor
    returns: Tensor | None


@dataclass(frozen=True)
class SampleInputs:
    """What an estimator of samples gets.

    Attributes:
        returns: score minus β times the KL of the whole response, `[samples]`.
        groups: int64 `[samples]`; samples of one prompt have the same number.
    """

    returns: Tensor
    groups: Tensor


TokenEstimator = Callable[[TokenInputs], TokenAdvantages]
SampleEstimator = Callable[[SampleInputs], Tensor]

_STD_EPS = 1e-6


def gae_of_tokens(inputs: TokenInputs) -> TokenAdvantages:
    """Generalised advantage estimation; see `gae`."""
    if inputs.values is None:
        raise TensorInputError("values", "the values of a critic", "None")
    return TokenAdvantages(*gae(inputs.rewards, inputs.values, inputs.offsets, inputs.gamma, inputs.lam))


def grpo(inputs: SampleInputs) -> Tensor:
    """Group-relative advantages.

        A_i = (R_i - mean of its group) / (deviation of its group + 1e-6)

    The deviation is that of a sample (divided by n - 1), as in the systems that people bring configs from; the mean
    has the sample itself in it. A group of one, and a group whose returns are all equal, has advantages of exactly 0.

    Source: Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300, section 4.1.2 (outcome supervision).

    Returns:
        `[samples]`, float64.
    """
    centred, count = _centred(inputs)
    squares = _sum_by_group(centred.square(), inputs.groups)
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    return centred / (deviation + _STD_EPS)


def rloo(inputs: SampleInputs) -> Tensor:
    """Each sample's return against the mean return of the others of its group.

        A_i = R_i - mean of the other samples = n / (n - 1) · (R_i - mean of its group)

    A group of one has no others, and an advantage of exactly 0.

    Source: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024, "Back to
    Basics", arXiv:2402.14740, section 3.2.

    Returns:
        `[samples]`, float64.
    """
    centred, count = _centred(inputs)
    return centred * count / (count - 1).clamp(min=1)


def groups_of(uids: list[str]) -> Tensor:
    """Numbers of the groups of samples by the uid of their prompt, int64 `[samples]`, in order of appearance."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in uids], dtype=torch.int64)


def spread_fraction(inputs: SampleInputs) -> float:
    """Share of the groups whose returns are not all equal: only they teach anything."""
    centred, _ = _centred(inputs)
    spread = torch.zeros(_group_count(inputs.groups), dtype=torch.bool)
    spread[inputs.groups[centred != 0]] = True
    return float(spread.double().mean()) if len(spread) else 0.0


def _centred(inputs: SampleInputs) -> tuple[Tensor, Tensor]:
    """Returns less the mean of their groups, exactly 0 where all of a group are equal, and the groups' sizes; float64
    `[samples]` both."""
    check_vectors(returns=inputs.returns)
    check_like("groups", inputs.groups, inputs.returns, torch.int64)
    returns = inputs.returns.detach().double()
    count = _sum_by_group(torch.ones_like(returns), inputs.groups)
    centred = returns - _sum_by_group(returns, inputs.groups) / count
    number = _group_count(inputs.groups)
    highest = returns.new_full((number,), -torch.inf).scatter_reduce(0, inputs.groups, returns, "amax")
    lowest = returns.new_full((number,), torch.inf).scatter_reduce(0, inputs.groups, returns, "amin")
    equal = (highest == lowest)[inputs.groups]
    return centred.masked_fill(equal, 0.0), count


def _sum_by_group(values: Tensor, groups: Tensor) -> Tensor:
    """For each sample, the sum over its group."""
    return values.new_zeros(_group_count(groups)).index_add(0, groups, values)[groups]


def _group_count(groups: Tensor) -> int:
    return int(groups.max()) + 1 if len(groups) else 0
