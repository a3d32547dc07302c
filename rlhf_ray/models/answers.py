"""Candidates of comparisons packed for a forward pass, with the places where their answers are predicted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.models.packed import PackedSequences


@dataclass(frozen=True)
class AnswerPack:
    """Some candidates, packed.

    Attributes:
        packed: the sequences.
        positions: int64 `[answer tokens]`, the place in the pack whose output predicts each token of an answer.
        targets: int64 `[answer tokens]`, those tokens.
        lengths: int64 `[candidates]`, tokens of each answer.
    """

    packed: PackedSequences
    positions: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, data: ComparisonSet, candidates: Sequence[int], device: torch.device) -> Self:
        """Pack candidates in the given order. With none, the pack is a dummy without answer tokens."""
        sequences = [data.tokens(candidate) for candidate in candidates]
        ends = np.cumsum([len(sequence) for sequence in sequences], dtype=np.int64)
        lengths = data.answer_lengths[np.asarray(candidates, np.int64)]
        places = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        answers = torch.from_numpy(np.concatenate([*places, np.empty(0, np.int64)])).to(device)
        packed = PackedSequences.of(sequences or [data.tokens(0)[:1]], device)
        return cls(packed, answers - 1, packed.input_ids[0][answers], torch.from_numpy(lengths).to(device))
