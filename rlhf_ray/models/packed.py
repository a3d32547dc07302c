"""Several sequences end to end in one row, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class PackedSequences:
    """A row of sequences; attention never crosses from one into the next.

    Attributes:
        input_ids: int64 `[1, tokens]`.
        position_ids: int64 `[1, tokens]`, starting at 0 in each sequence.
        cu_seqlens: int32 `[sequences + 1]`, where each sequence starts, and the end.
        max_length: tokens of the longest sequence.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int

    @classmethod
    def of(cls, sequences: Sequence[NDArray[np.int32]], device: torch.device) -> Self:
        """Pack token arrays, each of at least one token, in the given order."""
        lengths = np.array([len(sequence) for sequence in sequences])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        return cls(
            input_ids=torch.from_numpy(np.concatenate(sequences).astype(np.int64)).to(device)[None],
            position_ids=torch.from_numpy(positions).to(device)[None],
            cu_seqlens=torch.from_numpy(starts.astype(np.int32)).to(device),
            max_length=int(lengths.max()),
        )
