"""Rows of candidates as matrices and as pairs, which the losses of reward models are made of."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.algorithms.checks import check_vectors, parts_from_offsets
from rlhf_ray.algorithms.errors import SampleError, TensorInputError


@dataclass(frozen=True)
class CandidatePairs:
    """Every two candidates of the same row, once, row after row.

    Attributes:
        better: int64 `[pairs]`, the candidate of lower rank; of a tie the one that comes first.
        worse: int64 `[pairs]`, the other one.
        tied: bool `[pairs]`, both have the same rank.
        rows: int64 `[pairs]`, ascending.
    """

    better: Tensor
    worse: Tensor
    tied: Tensor
    rows: Tensor


def candidate_pairs(ranks: Tensor, offsets: Tensor) -> CandidatePairs:
    """All `k (k - 1) / 2` pairs of each row of k candidates.

    Raises:
        TensorInputError: ranks or offsets are not as the package describes.
        SampleError: a row has fewer than two candidates.
    """
    lengths = check_rows(ranks, offsets)
    widest = int(lengths.max()) if len(lengths) else 0
    first, second = torch.triu_indices(widest, widest, 1, device=ranks.device)
    rows, pair = (second < lengths[:, None]).nonzero(as_tuple=True)
    left, right = offsets[rows] + first[pair], offsets[rows] + second[pair]
    swapped = ranks[left] > ranks[right]
    return CandidatePairs(
        better=torch.where(swapped, right, left),
        worse=torch.where(swapped, left, right),
        tied=ranks[left] == ranks[right],
        rows=rows,
    )


def as_matrices(scores: Tensor, ranks: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and ranks as `[rows, widest]`, and which cells hold a candidate; the others repeat one of the row.

    Raises:
        TensorInputError: scores, ranks or offsets are not as the package describes.
        SampleError: a row has fewer than two candidates.
    """
    lengths = check_rows(ranks, offsets)
    check_scores(scores, ranks)
    widest = int(lengths.max()) if len(lengths) else 0
    column = torch.arange(widest, device=scores.device)
    cells = offsets[:-1, None] + torch.minimum(column, lengths[:, None] - 1)
    return scores[cells], ranks[cells], column < lengths[:, None]


def check_scores(scores: Tensor, ranks: Tensor) -> None:
    """Scores are floating `[candidates]`, as many as ranks."""
    check_vectors(scores=scores)
    if scores.shape != ranks.shape:
        raise TensorInputError("scores", f"shape {tuple(scores.shape)}", f"shape {tuple(ranks.shape)}, as ranks")


def check_rows(ranks: Tensor, offsets: Tensor) -> Tensor:
    """Lengths of the rows, int64 `[rows]`, once ranks and offsets have been found to fit."""
    if ranks.dim() != 1 or ranks.dtype != torch.int64:
        raise TensorInputError("ranks", f"shape {tuple(ranks.shape)} and {ranks.dtype}", "int64 [candidates]")
    lengths = parts_from_offsets(offsets, len(ranks), "candidates", "rows")
    if bool((lengths < 2).any()):
        short = torch.nonzero(lengths < 2).flatten().tolist()
        raise SampleError(short, "have fewer than two candidates", "a comparison needs at least two")
    return lengths
