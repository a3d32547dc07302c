"""The critic: values, and its own updates."""

from collections.abc import Sequence

import ray
import torch

from rlhf_ray.actors.columns import on_device, response_column
from rlhf_ray.actors.device_means import MicroStats
from rlhf_ray.actors.group import Calls, on_all
from rlhf_ray.actors.ppo_update import PPOTrainedGroup, PPOTrainedWorker, counted_places, token_mean
from rlhf_ray.actors.shards import GeneratedShard
from rlhf_ray.actors.trained import UpdateReport
from rlhf_ray.algorithms.value_loss import clipped_value_loss
from rlhf_ray.config import training as config
from rlhf_ray.config.algorithm import PPO
from rlhf_ray.data.columns import ColumnPart, Columns
from rlhf_ray.data.minibatches import OptimizerStep
from rlhf_ray.data.trajectory import TrajectoryBatch
from rlhf_ray.models.responses import ResponsePack
from rlhf_ray.telemetry.trace import in_span


class CriticWorker(PPOTrainedWorker):
    """One rank of the critic."""

    @in_span("load model")
    def load_model(self, critic: config.Critic, model: str, ppo: PPO, total_steps: int, seed: int) -> None:
        """Load the model and build its training engine; collective."""
        self.critic, self.ppo = critic, ppo
        self.load_scalar_model(critic, model, total_steps, seed)

    @torch.no_grad()
    def values(self, batch: TrajectoryBatch, index: int = 0, count: int = 1) -> ColumnPart:
        """Values of the responses in one of `count` slices: the return expected before each token."""
        with self.recorder.span("values"):
            return response_column(
                batch,
                self.slice_of(index, count),
                self.critic.engine.micro_batch_tokens,
                lambda pack: self.engine(pack.packed, pack.positions),
            )

    def update(
        self, shards: Sequence[ray.ObjectRef], starts: Sequence[int], plan: Sequence[OptimizerStep]
    ) -> UpdateReport:
        """The optimizer steps of a batch; see `optimize`."""
        with self.recorder.span("update"):
            return self.optimize(shards, starts, plan)

    def micro_batch_loss(
        self, pack: ResponsePack, columns: Columns, weights: torch.Tensor
    ) -> tuple[torch.Tensor, MicroStats]:
        """Clipped value loss."""
        values = self.engine(pack.packed, pack.positions)
        out = clipped_value_loss(values, on_device(columns.values), on_device(columns.returns), self.ppo.value_clip)
        return (out.loss * weights).sum(), {"clip_fraction": token_mean(out.clipped, counted_places(columns))}


class CriticGroup(PPOTrainedGroup[CriticWorker]):
    """The ranks of the critic."""

    load_model = on_all(CriticWorker.load_model)

    def values(self, shard: GeneratedShard) -> Calls[ColumnPart]:
        """Values of a shard's responses."""
        return self.call_shard(CriticWorker.values, shard)

    def update(
        self, shards: ray.ObjectRef, starts: Sequence[int], plans: Sequence[Sequence[OptimizerStep]]
    ) -> Calls[UpdateReport]:
        """The optimizer steps of a batch; see `PolicyGroup.update`."""
        return self.call_each(CriticWorker.update, [(shards, starts, plan) for plan in plans])
