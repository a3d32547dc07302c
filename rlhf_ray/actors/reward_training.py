"""A rank of a reward model in training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from rlhf_ray.actors.device_means import MicroStats
from rlhf_ray.actors.epoch_training import EpochTrainedGroup, EpochTrainedWorker, RowPlan
from rlhf_ray.actors.group import Calls, on_all
from rlhf_ray.actors.reward_losses import Judgements, row_losses, row_stats
from rlhf_ray.actors.waiting import fetch_data
from rlhf_ray.config.jobs import RewardModel
from rlhf_ray.config.reward_loss import RewardLoss
from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.platform import platform
from rlhf_ray.telemetry.trace import in_span


@dataclass(frozen=True)
class CandidateScores:
    """What one rank scored of a data set.

    Attributes:
        candidates: int64 `[scored]`, numbers of the candidates within the data set.
        scores: float32 `[scored]`.
    """

    candidates: NDArray[np.int64]
    scores: NDArray[np.float32]


class RewardTrainingWorker(EpochTrainedWorker):
    """One rank of the reward model."""

    @in_span("load model")
    def load_model(self, reward: RewardModel, loss: RewardLoss, total_steps: int, seed: int) -> None:
        """Load the model and build its training engine; collective."""
        self.loss = loss
        self.load_scalar_model(reward, reward.model, total_steps, seed)

    def micro_batch_loss(self, data: ComparisonSet, rows: Sequence[int]) -> tuple[torch.Tensor, MicroStats]:
        """Weighted sum of the losses of some rows."""
        scores = self._scores(data, rows)
        if not rows:
            return scores.sum() * 0.0, {}
        judged = Judgements.of(data, rows, scores.device)
        losses = row_losses(self.loss, scores, judged)
        return (losses * judged.weights).sum(), row_stats(losses, scores, judged)

    @torch.no_grad()
    def score(self, data: Sequence[ray.ObjectRef], micro_batches: Sequence[Sequence[int]]) -> CandidateScores:
        """Scores of the candidates of this rank's rows, without learning from them.

        Args:
            data: reference to the data set, in a list so that it stays in the object store.
        """
        found: ComparisonSet
        [found] = fetch_data(data, "the data set")
        with self.recorder.span("evaluate"):
            # An empty micro-batch is a forward pass too, which ZeRO-3's collectives need.
            scores = [self._scores(found, rows)[: len(found.candidates(rows))] for rows in micro_batches]
        if not self.data_slice.reports:
            return CandidateScores(np.empty(0, np.int64), np.empty(0, np.float32))
        candidates = [found.candidates(rows) for rows in micro_batches]
        return CandidateScores(np.concatenate(candidates), torch.cat(scores).cpu().numpy())

    def _scores(self, data: ComparisonSet, rows: Sequence[int]) -> torch.Tensor:
        """Scores of all candidates of some rows, row by row; without rows, that of a dummy."""
        texts = [data.tokens(candidate) for candidate in data.candidates(rows)] if rows else [data.tokens(0)[:1]]
        packed = PackedSequences.of(texts, platform().device)
        scores: torch.Tensor = self.engine(packed, packed.cu_seqlens[1:].long() - 1)
        return scores


class RewardTrainingGroup(EpochTrainedGroup[RewardTrainingWorker]):
    """The ranks of a reward model in training."""

    load_model = on_all(RewardTrainingWorker.load_model)

    def score(self, plan: RowPlan) -> Calls[CandidateScores]:
        """Scores of the candidates of rows."""
        return self.call_each(RewardTrainingWorker.score, plan)
