"""Candidates of comparisons packed for a forward pass, with the places where their answers are predicted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.platform import to_device


@dataclass(frozen=True)
class AnswerPack:
    """Some candidates, packed. Candidates of a row that have the same prompt share its tokens.

    Attributes:
        packed: the sequences.
        positions: int64 `[answer tokens]`, the place in the pack whose output predicts each token of an answer.
        targets: int64 `[answer tokens]`, those tokens.
        lengths: int64 `[candidates]`, tokens of each answer; in host memory.
    """

    packed: PackedSequences
    positions: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, data: ComparisonSet, candidates: Sequence[int], device: torch.device) -> Self:
        """Pack candidates in the given order. With none, the pack is a dummy without answer tokens."""
        sequences: list[NDArray[np.int32]] = []
        prefixes: list[tuple[int, int]] = []
        places: list[NDArray[np.int64]] = []
        # Where the last prompt lies in the pack.
        shared_start, shared = 0, np.empty(0, np.int32)
        end = 0
        for candidate in candidates:
            tokens, length = data.tokens(candidate), int(data.answer_starts[candidate])
            prompt = tokens[:length]
            if np.array_equal(prompt, shared):
                sequences.append(tokens[length:])
                prefixes.append((shared_start, length))
            else:
                shared_start, shared = end, prompt
                sequences.append(tokens)
                prefixes.append((0, 0))
            own = np.arange(end, end + len(sequences[-1]))
            # The first token of an answer is predicted by the prompt's last, wherever it lies.
            answer = own[len(own) - len(tokens) + length :]
            places.append(np.concatenate([[shared_start + length - 1], answer[:-1]]))
            end += len(own)
        if not sequences:
            sequences = [data.tokens(0)[:1]]
        targets = [data.tokens(candidate)[data.answer_starts[candidate] :] for candidate in candidates]
        return cls(
            packed=PackedSequences.of(sequences, device, prefixes),
            positions=to_device(torch.from_numpy(np.concatenate([*places, np.empty(0)]).astype(np.int64)), device),
            targets=to_device(torch.from_numpy(np.concatenate([*targets, np.empty(0)]).astype(np.int64)), device),
            lengths=torch.from_numpy(np.array([len(answer) for answer in targets], np.int64)),
        )
