"""Log-probs of answers as they travel between actors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.data.trajectory import Floats, Offsets, offsets_of, take_rows
from rlhf_ray.models.answers import AnswerPack
from rlhf_ray.platform import platform

if TYPE_CHECKING:
    from rlhf_ray.engines.training import ForwardEngine, TrainingEngine


@dataclass(frozen=True)
class AnswerLogProbs:
    """Log-probs of the answers of some candidates, one answer after the other.

    Attributes:
        candidates: their numbers within the data set.
        offsets: int64 `[candidates + 1]`.
        values: float32 `[answer tokens]`, nats.
    """

    candidates: tuple[int, ...]
    offsets: Offsets
    values: Floats

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        engine: "TrainingEngine | ForwardEngine",
        data: ComparisonSet,
        micro_batches: Sequence[Sequence[int]],
        *,
        reports: bool = True,
    ) -> Self:
        """What a model makes of the answers in some micro-batches of rows; collective.

        Args:
            reports: whether to give them; else the passes are made for neighbours that share sequences.
        """
        found: list[int] = []
        values: list[torch.Tensor] = []
        for rows in micro_batches:
            candidates = data.candidates(rows).tolist()
            pack = AnswerPack.of(data, candidates, platform().device)
            values.append(engine(pack.packed, pack.positions, pack.targets, 1.0, "nothing")[0].float())
            found += candidates
        if not reports:
            return cls((), offsets_of([]), np.empty(0, np.float32))
        lengths = data.answer_lengths[np.asarray(found, np.int64)]
        return cls(tuple(found), offsets_of(lengths), torch.cat(values).cpu().numpy())

    @classmethod
    def join(cls, parts: Sequence["AnswerLogProbs"]) -> "AnswerLogProbs":
        """All of them as one."""
        return AnswerLogProbs(
            tuple(candidate for part in parts for candidate in part.candidates),
            offsets_of(np.concatenate([np.diff(part.offsets) for part in parts])),
            np.concatenate([part.values for part in parts]),
        )

    def select(self, candidates: Sequence[int]) -> "AnswerLogProbs":
        """Those of some candidates, in the given order."""
        places = [self._place[candidate] for candidate in candidates]
        lengths = np.diff(self.offsets)[places]
        return AnswerLogProbs(tuple(candidates), offsets_of(lengths), self.values[take_rows(self.offsets, places)])

    def take(self, candidates: Sequence[int]) -> torch.Tensor:
        """Log-probs of these candidates' answers in the given order, float32 `[answer tokens]`."""
        return torch.from_numpy(self.select(candidates).values)

    @cached_property
    def _place(self) -> dict[int, int]:
        return {candidate: number for number, candidate in enumerate(self.candidates)}
