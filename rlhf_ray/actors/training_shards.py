"""From generated shards and the columns that roles made of them to the shards that are trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_ray.actors.columns import assemble
from rlhf_ray.actors.shards import Refs, ScoredColumns
from rlhf_ray.actors.waiting import fetch_data
from rlhf_ray.algorithms.advantages import shaped_rewards
from rlhf_ray.algorithms.estimators import TokenInputs
from rlhf_ray.algorithms.kl import kl_estimate
from rlhf_ray.algorithms.moments import Moments
from rlhf_ray.algorithms.value_loss import ExplainedVariance
from rlhf_ray.config.algorithm import PPO
from rlhf_ray.config.plugs import imported
from rlhf_ray.data.columns import Columns, TrainingShard
from rlhf_ray.data.trajectory import Floats, TrajectoryBatch, offsets_of


@dataclass(frozen=True)
class TrainingShardReport:
    """What the controller needs to know of a shard that is trained on.

    Attributes:
        kl: KL to the reference per response in nats (k1, summed over the policy's tokens), `[samples]`.
        penalty: the sum of the configured KL estimate over the same tokens, `[samples]`.
        mismatch: sum over tokens of |engine's log-prob − trainer's|.
        advantages: moments, for whitening over the whole batch; None where advantages are of whole samples.
        explained_variance: of the returns by the critic's values; None without a critic.
    """

    kl: Floats
    penalty: Floats
    mismatch: float
    advantages: Moments | None
    explained_variance: ExplainedVariance | None


def make_training_shard(
    scored: ScoredColumns, scores: Floats, kl_coef: float, ppo: PPO
) -> tuple[TrainingShard, TrainingShardReport]:
    """Join the parts of the columns, and estimate the advantages of tokens where the algorithm has such.

    Args:
        scores: shaped, float32 `[samples of all shards]`.
        kl_coef: β.
    """
    shards: list[TrajectoryBatch] = fetch_data(scored.trajectories, "shards")
    old, reference = (_column(parts, shards) for parts in (scored.old_logprobs, scored.reference_logprobs))
    value = None if scored.values is None else _column(scored.values, shards)
    batch = TrajectoryBatch.concat(shards)
    # What is context and no action of the policy has no reward, no advantage and no part in any sum.
    actions = torch.from_numpy(batch.loss_mask)
    offsets = torch.from_numpy(offsets_of(batch.action_lengths))
    kl = kl_estimate(old[actions], reference[actions], ppo.kl.estimator)

    advantages = returns = moments = explained = None
    if ppo.estimator.per_token:
        rewards = shaped_rewards(torch.from_numpy(scores), kl, offsets, kl_coef)
        values = None if value is None else value[actions]
        found = imported(ppo.estimator.function)(TokenInputs(rewards, offsets, values, ppo.gamma, ppo.gae_lambda))
        moments = Moments.of(found.advantages)
        advantages = _spread(found.advantages, actions)
        if found.returns is not None and values is not None:
            returns = _spread(found.returns, actions)
            explained = ExplainedVariance.of(values, found.returns)
    columns = Columns(
        old_logprobs=old.numpy(),
        reference_logprobs=reference.numpy() if "reference_logprobs" in ppo.loss.columns else None,
        values=None if value is None else value.numpy(),
        advantages=advantages,
        returns=returns,
    )
    engine = torch.tensor(batch.engine_logprobs)
    report = TrainingShardReport(
        kl=_sums((old - reference)[actions], offsets),
        penalty=_sums(kl, offsets),
        mismatch=float((engine - old)[actions].abs().double().sum()),
        advantages=moments,
        explained_variance=explained,
    )
    return TrainingShard(batch, columns), report


def _column(parts_of_shards: Sequence[Refs], shards: Sequence[TrajectoryBatch]) -> torch.Tensor:
    fetched = [fetch_data(parts, "columns of a shard") for parts in parts_of_shards]
    return torch.cat([assemble(parts, shard) for parts, shard in zip(fetched, shards, strict=True)])


def _sums(values: torch.Tensor, offsets: torch.Tensor) -> Floats:
    """Sums over the tokens of each sample, float32 `[samples]`."""
    return np.add.reduceat(values.numpy(), offsets[:-1].numpy())


def _spread(values: torch.Tensor, actions: torch.Tensor) -> Floats:
    """Numbers of actions at their places among all response tokens, 0 elsewhere."""
    column = torch.zeros(len(actions), dtype=torch.float32)
    column[actions] = values.float()
    return column.numpy()
