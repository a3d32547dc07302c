"""A rank of a reward model in training."""

from collections.abc import Sequence
from functools import partial

import ray
import torch

from rlhf_ray.actors.trained import Stopwatch, TrainedWorker, UpdateReport
from rlhf_ray.actors.waiting import fetch_data
from rlhf_ray.algorithms.preference_loss import bradley_terry_loss
from rlhf_ray.config.jobs import RewardModel
from rlhf_ray.data.pairs import PairSet
from rlhf_ray.engines.training import DTYPES, TrainingEngine
from rlhf_ray.models.heads import load_scalar
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.platform import platform
from rlhf_ray.telemetry.metrics import Mean


class RewardTrainingWorker(TrainedWorker):
    """One rank of the reward model."""

    def load_model(self, reward: RewardModel, total_steps: int, seed: int) -> None:
        """Load the model and build its training engine; collective."""
        self.model_source, self.trust_remote_code = reward.model, reward.trust_remote_code
        model = load_scalar(
            reward.model, dtype=DTYPES[reward.engine.dtype], seed=seed, trust_remote_code=reward.trust_remote_code
        )
        self.engine = TrainingEngine(model, reward.engine, reward.optimizer, total_steps)

    def step(
        self, pairs: Sequence[ray.ObjectRef], micro_batches: Sequence[Sequence[int]], step_pairs: int
    ) -> UpdateReport:
        """One optimizer step on this rank's micro-batches.

        Args:
            pairs: reference to the `PairSet`, in a list so that it stays in the object store.
            step_pairs: pairs of the whole step, over all ranks.

        Raises:
            NonFiniteLossError: before the optimizer step.
        """
        watch = Stopwatch()
        data: PairSet = fetch_data(pairs, "the pairs")[0]
        with self.recorder.span("update"):
            means: dict[str, Mean] = {}
            for number, micro_batch in enumerate(micro_batches):
                loss, found = self._loss(data, micro_batch)
                value = float(loss.detach())
                self.check_finite("loss", value, partial(_uids, data, micro_batch))
                self.engine.backward(loss / step_pairs, last=number == len(micro_batches) - 1)
                means = {name: means.get(name, Mean()) + mean for name, mean in found.items()}
            done = self.engine.step()
            self.check_finite(
                "gradient norm",
                done.grad_norm,
                partial(_uids, data, [pair for micro in micro_batches for pair in micro]),
            )
        means["grad_norm"] = Mean(done.grad_norm, 1.0)
        return UpdateReport(means, done.lr, 1, sum(len(micro) for micro in micro_batches), watch.seconds)

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[ray.ObjectRef], micro_batches: Sequence[Sequence[int]]) -> dict[str, Mean]:
        """Loss and accuracy on this rank's micro-batches."""
        data: PairSet = fetch_data(pairs, "the pairs")[0]
        means: dict[str, Mean] = {}
        with self.recorder.span("evaluate"):
            for micro_batch in micro_batches:
                _, found = self._loss(data, micro_batch)
                means = {name: means.get(name, Mean()) + mean for name, mean in found.items()}
        return means

    def _loss(self, data: PairSet, pairs: Sequence[int]) -> tuple[torch.Tensor, dict[str, Mean]]:
        """Sum of the pairs' losses, and what to log. An empty micro-batch is a dummy pass, for ZeRO-3."""
        device = platform().device
        texts = [data.chosen(pair) for pair in pairs] + [data.rejected(pair) for pair in pairs]
        if not texts:
            packed = PackedSequences.of([data.chosen(0)[:1]], device)
            return self.engine(packed, torch.zeros(1, dtype=torch.int64, device=device)).sum() * 0.0, {}
        packed = PackedSequences.of(texts, device)
        chosen, rejected = self.engine(packed, packed.cu_seqlens[1:].long() - 1).chunk(2)
        losses = bradley_terry_loss(chosen, rejected)
        margins = (chosen - rejected).detach()
        found = {
            "loss": Mean(float(losses.detach().sum()), len(pairs)),
            "accuracy": Mean(float((margins > 0).sum()), len(pairs)),
            "margin": Mean(float(margins.sum()), len(pairs)),
        }
        return losses.sum(), found


def _uids(data: PairSet, pairs: Sequence[int]) -> list[str]:
    return [data.uids[pair] for pair in pairs]
