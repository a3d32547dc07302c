"""Several sequences end to end in one row, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.platform import to_device


@dataclass(frozen=True)
class PackedSequences:
    """A row of sequences; attention never crosses from one into the next.

    A sequence may go on from a prefix that lies in an earlier one, which is then computed once for both.

    Attributes:
        input_ids: int64 `[1, tokens]`.
        position_ids: int64 `[1, tokens]`, starting at 0 in each sequence, or where its prefix ends.
        cu_seqlens: int32 `[sequences + 1]`, where each sequence's own tokens start, and the end.
        max_length: tokens of the longest sequence, its prefix included.
        prefixes: for each sequence start and length of its prefix within the pack, length 0 for none; None when no
            sequence has one.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int
    prefixes: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(
        cls,
        sequences: Sequence[NDArray[np.int32]],
        device: torch.device,
        prefixes: Sequence[tuple[int, int]] | None = None,
    ) -> Self:
        """Pack token arrays, each of at least one token, in the given order.

        Args:
            sequences: each without its prefix.
            prefixes: as in the attribute.
        """
        own = np.array([len(sequence) for sequence in sequences])
        before = np.array([length for _, length in prefixes]) if prefixes else np.zeros_like(own)
        starts = np.concatenate([[0], np.cumsum(own)])
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1] - before, own)
        return cls(
            input_ids=to_device(torch.from_numpy(np.concatenate(sequences).astype(np.int64)), device)[None],
            position_ids=to_device(torch.from_numpy(positions), device)[None],
            cu_seqlens=to_device(torch.from_numpy(starts.astype(np.int32)), device),
            max_length=int((own + before).max()),
            prefixes=tuple(prefixes) if before.any() and prefixes else None,
        )
