"""Samples packed for a forward pass, with the places where their responses are predicted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from rlhf_ray.data.trajectory import TrajectoryBatch
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.platform import to_device


@dataclass(frozen=True)
class ResponsePack:
    """Prompts and responses of some samples, packed.

    Attributes:
        packed: the sequences.
        positions: int64 `[response tokens]`, the place in the pack whose output predicts each response token.
        targets: int64 `[response tokens]`, those tokens.
        last: int64 `[samples]`, the place of each sample's last token.
        lengths: int64 `[samples]`, tokens of each response; in host memory.
    """

    packed: PackedSequences
    positions: torch.Tensor
    targets: torch.Tensor
    last: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, batch: TrajectoryBatch, samples: Sequence[int], device: torch.device) -> Self:
        """Pack `samples` of `batch` in the given order. With none, the pack is a dummy without response tokens."""
        sequences = [np.concatenate([batch.prompt(sample), batch.response(sample)]) for sample in samples]
        lengths = np.array([len(sequence) for sequence in sequences], np.int64)
        responses = batch.response_lengths[np.asarray(samples, np.int64)] if len(samples) else lengths
        ends = np.cumsum(lengths)
        # Token j of a response is predicted one place before it.
        first = np.repeat(ends - responses - 1, responses)
        within = np.arange(responses.sum()) - np.repeat(np.cumsum(responses) - responses, responses)
        packed = PackedSequences.of(sequences or [np.zeros(1, np.int32)], device)
        positions = to_device(torch.from_numpy(first + within), device)
        return cls(
            packed=packed,
            positions=positions,
            targets=packed.input_ids[0][positions + 1],
            last=to_device(torch.from_numpy(ends - 1), device),
            lengths=torch.from_numpy(responses.astype(np.int64)),
        )
