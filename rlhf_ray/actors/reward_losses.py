"""The loss of a reward model that a config asks for, and what is logged of scored rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from rlhf_ray.actors.trained import Stats
from rlhf_ray.algorithms.reward_model.listwise import plackett_luce_loss, softmax_loss
from rlhf_ray.algorithms.reward_model.pairwise import all_pairs_loss, bradley_terry_loss, centering_penalty
from rlhf_ray.algorithms.reward_model.rows import candidate_pairs
from rlhf_ray.config.reward_loss import AllPairs, BradleyTerry, PlackettLuce, RewardLoss, Softmax
from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.data.trajectory import offsets_of
from rlhf_ray.telemetry.metrics import Mean


@dataclass(frozen=True)
class Judgements:
    """What people said about some rows.

    Attributes:
        ranks: int64 `[candidates]`, 0 for the best of a row.
        offsets: int64 `[rows + 1]`, where each row's candidates begin.
        margins: float32 `[rows]`.
        weights: float32 `[rows]`.
    """

    ranks: torch.Tensor
    offsets: torch.Tensor
    margins: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, data: ComparisonSet, rows: Sequence[int], device: torch.device) -> Self:
        """Those of `rows`, in that order."""
        counts = np.diff(data.candidate_offsets)[list(rows)]
        return cls(
            ranks=torch.from_numpy(data.ranks[data.candidates(rows)]).to(device),
            offsets=torch.from_numpy(offsets_of(counts)).to(device),
            margins=torch.from_numpy(data.margins[list(rows)]).to(device),
            weights=torch.from_numpy(data.weights[list(rows)]).float().to(device),
        )


def row_losses(loss: RewardLoss, scores: torch.Tensor, judged: Judgements) -> torch.Tensor:
    """Loss of each row, `[rows]`, from the scores of its candidates, `[candidates]`."""
    match loss:
        case BradleyTerry():
            pairs = candidate_pairs(judged.ranks, judged.offsets)
            chosen, rejected = scores[pairs.better], scores[pairs.worse]
            losses = bradley_terry_loss(chosen, rejected, loss.margin * judged.margins, pairs.tied)
            return losses + loss.centering * centering_penalty(chosen, rejected) if loss.centering else losses
        case Softmax():
            return softmax_loss(scores, judged.ranks, judged.offsets)
        case PlackettLuce():
            return plackett_luce_loss(scores, judged.ranks, judged.offsets)
        case AllPairs():
            return all_pairs_loss(scores, judged.ranks, judged.offsets)


def row_stats(losses: torch.Tensor, scores: torch.Tensor, judged: Judgements) -> Stats:
    """What is logged of some rows: the weighted loss, and over their ordered pairs how many are right, and by what."""
    pairs = candidate_pairs(judged.ranks, judged.offsets)
    differences = (scores[pairs.better] - scores[pairs.worse])[~pairs.tied].detach()
    count = len(differences)
    return {
        "loss": Mean(float((losses.detach() * judged.weights).sum()), float(judged.weights.sum())),
        "accuracy": Mean(float((differences > 0).sum()), count),
        "margin": Mean(float(differences.sum()), count),
    }
