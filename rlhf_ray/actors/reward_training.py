"""A rank of a reward model in training."""

from collections.abc import Sequence

import torch

from rlhf_ray.actors.epoch_training import EpochTrainedWorker
from rlhf_ray.actors.trained import Stats
from rlhf_ray.algorithms.preference_loss import bradley_terry_loss
from rlhf_ray.config.jobs import RewardModel
from rlhf_ray.data.pairs import PairSet
from rlhf_ray.engines.training import DTYPES, TrainingEngine
from rlhf_ray.models.heads import load_scalar
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.platform import platform
from rlhf_ray.telemetry.metrics import Mean


class RewardTrainingWorker(EpochTrainedWorker):
    """One rank of the reward model."""

    def load_model(self, reward: RewardModel, total_steps: int, seed: int) -> None:
        """Load the model and build its training engine; collective."""
        self.model_source, self.trust_remote_code = reward.model, reward.trust_remote_code
        model = load_scalar(
            reward.model,
            dtype=DTYPES[reward.engine.dtype],
            seed=seed,
            trust_remote_code=reward.trust_remote_code,
            lora=reward.lora,
        )
        self.engine = TrainingEngine(model, reward.engine, reward.optimizer, total_steps)

    def micro_batch_loss(self, data: PairSet, rows: Sequence[int]) -> tuple[torch.Tensor, Stats]:
        """Sum of the Bradley–Terry losses of some pairs."""
        device = platform().device
        texts = [data.chosen(pair) for pair in rows] + [data.rejected(pair) for pair in rows]
        if not texts:
            packed = PackedSequences.of([data.chosen(0)[:1]], device)
            return self.engine(packed, torch.zeros(1, dtype=torch.int64, device=device)).sum() * 0.0, {}
        packed = PackedSequences.of(texts, device)
        chosen, rejected = self.engine(packed, packed.cu_seqlens[1:].long() - 1).chunk(2)
        losses = bradley_terry_loss(chosen, rejected)
        margins = (chosen - rejected).detach()
        found = {
            "loss": Mean(float(losses.detach().sum()), len(rows)),
            "accuracy": Mean(float((margins > 0).sum()), len(rows)),
            "margin": Mean(float(margins.sum()), len(rows)),
        }
        return losses.sum(), found
