"""The optimizer steps of one PPO update, for policy and critic alike."""

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import ray
import torch

from rlhf_ray.actors.columns import RankBatch
from rlhf_ray.actors.device_means import DeviceMean, MicroStats
from rlhf_ray.actors.shards import ScoredColumns
from rlhf_ray.actors.trained import Stats, TrainedGroup, TrainedWorker, UpdateReport
from rlhf_ray.actors.training_shards import TrainingShardReport, make_training_shard
from rlhf_ray.actors.waiting import fetch_data
from rlhf_ray.algorithms.aggregation import token_weights
from rlhf_ray.config.algorithm import PPO
from rlhf_ray.data.columns import Columns, TrainingShard
from rlhf_ray.data.minibatches import OptimizerStep
from rlhf_ray.data.trajectory import Floats
from rlhf_ray.models.responses import ResponsePack
from rlhf_ray.platform import to_device
from rlhf_ray.telemetry.metrics import Mean, sum_means


class PPOTrainedWorker(TrainedWorker):
    """A role that takes the optimizer steps of a plan; what its loss is, the subclass says."""

    ppo: PPO

    @abstractmethod
    def micro_batch_loss(
        self, pack: ResponsePack, columns: Columns, weights: torch.Tensor
    ) -> tuple[torch.Tensor, MicroStats]:
        """Weighted sum of the token losses of a micro-batch, and what to log of it.

        Args:
            weights: of each token, `[tokens]`; 0 where a token counts in nothing.
        """

    def make_training_shard(
        self, scored: ScoredColumns, scores: Floats, kl_coef: float
    ) -> tuple[TrainingShard, TrainingShardReport]:
        """See the function of this name."""
        with self.recorder.span("advantages"):
            return make_training_shard(scored, scores, kl_coef, self.ppo)

    def after_step(self, stats: Stats) -> bool:
        """Whether to go on with the next optimizer step of this batch; collective."""
        return True

    def optimize(
        self,
        shards: Sequence[ray.ObjectRef],
        starts: Sequence[int],
        plan: Sequence[OptimizerStep],
        advantages: Floats | None = None,
    ) -> UpdateReport:
        """Take the optimizer steps of this rank's plan.

        Args:
            shards: references to each `TrainingShard`.
            starts: number of each shard's first sample.
            plan: this rank's micro-batches.
            advantages: of whole samples, float32 `[samples of the batch]`; None where the shards have a column of them.

        Raises:
            NonFiniteLossError: as `optimizer_step`.
        """
        began = time.perf_counter()
        mine = {sample for step in plan for micro in step.micro_batches for sample in micro}
        data = RankBatch.of(fetch_data(shards, "samples to train on"), starts, sorted(mine), advantages)
        total: Stats = {}
        lr, steps, samples = 0.0, 0, 0
        for step in plan:
            stats, lr = self._step(data, step)
            total = sum_means((total, stats))
            steps += 1
            samples += sum(len(micro) for micro in step.micro_batches)
            if not self.after_step(stats):
                break
        if not self.data_slice.reports:
            total, samples = {}, 0
        return UpdateReport(total, lr, steps, samples, time.perf_counter() - began)

    def _step(self, data: RankBatch, step: OptimizerStep) -> tuple[Stats, float]:
        def loss_of(samples: Sequence[int]) -> tuple[torch.Tensor, MicroStats]:
            pack, columns = data.pack(samples)
            actions = None if columns.loss_mask is None else torch.from_numpy(columns.loss_mask)
            weights = token_weights(pack.lengths, self.ppo.loss_mean, step.step_tokens, step.step_samples, actions)
            return self.micro_batch_loss(pack, columns, to_device(weights))

        losses, stats, lr = self.optimizer_step(step.micro_batches, loss_of, data.names)
        # A loss is its micro-batch's share of the step's: shares add up, and steps average.
        weight = 1.0 / (len(step.micro_batches) * self.data_slice.count)
        return sum_means((stats, *({"loss": Mean(value, weight)} for value in losses))), lr


PPOTrainedT = TypeVar("PPOTrainedT", bound=PPOTrainedWorker)


class PPOTrainedGroup(TrainedGroup[PPOTrainedT]):
    """Ranks that take the optimizer steps of a plan."""

    def make_training_shard(
        self, rank: int, scored: ScoredColumns, scores: Floats, kl_coef: float
    ) -> tuple[ray.ObjectRef, ray.ObjectRef]:
        """References to a `TrainingShard` and its `TrainingShardReport`, which one rank makes."""
        return self.call_rank_for_two(rank, PPOTrainedWorker.make_training_shard, scored, scores, kl_coef)


def counted_places(columns: Columns) -> torch.Tensor:
    """Which response tokens of a micro-batch count, int64 `[counted]`. How many there are is known without waiting."""
    if columns.loss_mask is None:
        raise ValueError("a batch to train on has a column loss_mask, but this one has none")
    return to_device(torch.from_numpy(np.flatnonzero(columns.loss_mask)))


def token_mean(values: torch.Tensor, counted: torch.Tensor) -> DeviceMean:
    """Mean of the tokens that count, of `[tokens]` those at `[counted]`."""
    return DeviceMean(values.detach()[counted].double().sum(), float(len(counted)))
