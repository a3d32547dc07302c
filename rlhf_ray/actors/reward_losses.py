"""The loss of a reward model that a config asks for, and what is logged of scored rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from rlhf_ray.actors.device_means import DeviceMean, MicroStats
from rlhf_ray.algorithms.reward_model.listwise import plackett_luce_loss, softmax_loss
from rlhf_ray.algorithms.reward_model.pairwise import all_pairs_loss, bradley_terry_loss, centering_penalty
from rlhf_ray.algorithms.reward_model.rows import CandidatePairs, candidate_pairs
from rlhf_ray.config.reward_loss import AllPairs, BradleyTerry, PlackettLuce, RewardLoss, Softmax
from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.data.trajectory import offsets_of
from rlhf_ray.platform import to_device


@dataclass(frozen=True)
class Judgements:
    """What people said about some rows.

    Attributes:
        ranks: int64 `[candidates]`, 0 for the best of a row.
        offsets: int64 `[rows + 1]`, where each row's candidates begin.
        margins: float32 `[rows]`.
        weights: float32 `[rows]`.
        pairs: of candidates of the same row.
        ordered: int64, the pairs that are no tie.
    """

    ranks: torch.Tensor
    offsets: torch.Tensor
    margins: torch.Tensor
    weights: torch.Tensor
    pairs: CandidatePairs
    ordered: torch.Tensor

    @classmethod
    def of(cls, data: ComparisonSet, rows: Sequence[int], device: torch.device) -> Self:
        """Those of `rows`, in that order."""
        counts = np.diff(data.candidate_offsets)[list(rows)]
        ranks = torch.from_numpy(data.ranks[data.candidates(rows)])
        offsets = torch.from_numpy(offsets_of(counts))
        pairs = candidate_pairs(ranks, offsets)  # before they leave host memory: how many there are is data
        return cls(
            ranks=to_device(ranks, device),
            offsets=to_device(offsets, device),
            margins=to_device(torch.from_numpy(data.margins[list(rows)]), device),
            weights=to_device(torch.from_numpy(data.weights[list(rows)]).float(), device),
            pairs=CandidatePairs(
                better=to_device(pairs.better, device),
                worse=to_device(pairs.worse, device),
                tied=to_device(pairs.tied, device),
                rows=to_device(pairs.rows, device),
            ),
            ordered=to_device((~pairs.tied).nonzero()[:, 0], device),
        )


def row_losses(loss: RewardLoss, scores: torch.Tensor, judged: Judgements) -> torch.Tensor:
    """Loss of each row, `[rows]`, from the scores of its candidates, `[candidates]`."""
    match loss:
        case BradleyTerry():
            pairs = judged.pairs
            chosen, rejected = scores[pairs.better], scores[pairs.worse]
            losses = bradley_terry_loss(chosen, rejected, loss.margin * judged.margins, pairs.tied)
            return losses + loss.centering * centering_penalty(chosen, rejected) if loss.centering else losses
        case Softmax():
            return softmax_loss(scores, judged.ranks, judged.offsets)
        case PlackettLuce():
            return plackett_luce_loss(scores, judged.ranks, judged.offsets)
        case AllPairs():
            return all_pairs_loss(scores, judged.ranks, judged.offsets)


def row_stats(losses: torch.Tensor, scores: torch.Tensor, judged: Judgements) -> MicroStats:
    """What is logged of some rows: the weighted loss, and over their ordered pairs how many are right, and by what."""
    pairs = judged.pairs
    differences = (scores[pairs.better] - scores[pairs.worse])[judged.ordered].detach()
    count = len(differences)
    return {
        "loss": DeviceMean((losses.detach() * judged.weights).sum(), judged.weights.sum()),
        "accuracy": DeviceMean((differences > 0).sum(), count),
        "margin": DeviceMean(differences.sum(), count),
    }
