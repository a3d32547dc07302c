"""The critic: values, advantages, and its own updates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch

from rlhf_ray.actors.columns import PortionReport, assemble, column_offsets, on_device, response_column
from rlhf_ray.actors.device_means import MicroStats
from rlhf_ray.actors.ppo_update import PPOTrainedWorker, token_mean
from rlhf_ray.actors.trained import UpdateReport
from rlhf_ray.actors.waiting import fetch_data
from rlhf_ray.algorithms.advantages import gae, shaped_rewards
from rlhf_ray.algorithms.kl import kl_estimate
from rlhf_ray.algorithms.moments import Moments
from rlhf_ray.algorithms.value_loss import ExplainedVariance, clipped_value_loss
from rlhf_ray.config import training as config
from rlhf_ray.config.algorithm import PPO
from rlhf_ray.data.columns import ColumnPart, TrainingColumns
from rlhf_ray.data.trajectory import Floats, TrajectoryBatch
from rlhf_ray.engines.training import DTYPES, TrainingEngine
from rlhf_ray.models.heads import load_scalar
from rlhf_ray.models.responses import ResponsePack
from rlhf_ray.telemetry.trace import in_span


class CriticWorker(PPOTrainedWorker):
    """One rank of the critic."""

    @in_span("load model")
    def load_model(self, critic: config.Critic, model: str, ppo: PPO, total_steps: int, seed: int) -> None:
        """Load the model and build its training engine; collective."""
        self.critic, self.ppo = critic, ppo
        self.model_source, self.trust_remote_code = model, critic.trust_remote_code
        loaded = load_scalar(
            model,
            dtype=DTYPES[critic.engine.dtype],
            seed=seed,
            trust_remote_code=critic.trust_remote_code,
            lora=critic.lora,
            sharded=critic.engine.zero_stage == 3,
        )
        self.engine = TrainingEngine(loaded, critic.engine, critic.optimizer, total_steps)

    @torch.no_grad()
    def values(self, batch: TrajectoryBatch, part: int = 0, parts: int = 1) -> ColumnPart:
        """Values of a part of the responses: the return expected before each token."""
        with self.recorder.span("values"):
            return response_column(
                batch,
                self.share_of_part(part, parts),
                self.critic.engine.micro_batch_tokens,
                lambda pack: self.engine(pack.packed, pack.positions),
            )

    def advantages(
        self,
        trajectories: Sequence[ray.ObjectRef],
        scores: Floats,
        kl_coef: float,
        old_logprobs: Sequence[Sequence[ray.ObjectRef]],
        reference_logprobs: Sequence[Sequence[ray.ObjectRef]],
        values: Sequence[Sequence[ray.ObjectRef]],
    ) -> tuple[tuple[TrajectoryBatch, TrainingColumns], PortionReport]:
        """From some shards and the parts of their columns to one portion of what is trained on.

        Args:
            scores: shaped, float32 `[samples of all shards]`.
        """
        shards = fetch_data(trajectories, "shards")
        columns_of_shards = [
            [fetch_data(parts, "columns of a shard") for parts in column]
            for column in (old_logprobs, reference_logprobs, values)
        ]
        with self.recorder.span("advantages"):
            batch = TrajectoryBatch.concat(shards)
            old, reference, value = (
                torch.cat([assemble(parts, shard) for parts, shard in zip(column, shards, strict=True)])
                for column in columns_of_shards
            )
            offsets = column_offsets(batch)
            kl = kl_estimate(old, reference, self.ppo.kl.estimator)
            rewards = shaped_rewards(torch.from_numpy(scores), kl, offsets, kl_coef)
            advantages, returns = gae(rewards, value, offsets, self.ppo.gamma, self.ppo.gae_lambda)
            columns = TrainingColumns(old.numpy(), value.numpy(), advantages.numpy(), returns.numpy())
            engine = torch.tensor(batch.engine_logprobs)
            report = PortionReport(
                advantages=Moments.of(advantages),
                explained_variance=ExplainedVariance.of(value, returns),
                kl=np.add.reduceat((old - reference).numpy(), batch.response_offsets[:-1]),
                mismatch=float((engine - old).abs().double().sum()),
            )
            return (batch, columns), report

    def update(self, portions: Any, starts: Any, plan: Any) -> UpdateReport:
        """One PPO update; see `optimize`."""
        with self.recorder.span("update"):
            return self.optimize(portions, starts, plan)

    def micro_batch_loss(
        self, pack: ResponsePack, columns: TrainingColumns, weights: torch.Tensor
    ) -> tuple[torch.Tensor, MicroStats]:
        """Clipped value loss."""
        values = self.engine(pack.packed, pack.positions)
        out = clipped_value_loss(values, on_device(columns.values), on_device(columns.returns), self.ppo.value_clip)
        return (out.loss * weights).sum(), {"clip_fraction": token_mean(out.clipped)}
