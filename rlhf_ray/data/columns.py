"""Numbers per response token that roles add to a shard, as they travel between actors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.trajectory import Floats


@dataclass(frozen=True)
class ColumnPart:
    """What one rank computed of a column: the responses of `samples`, one after the other.

    Attributes:
        samples: numbers of the samples within the shard.
        values: float32 `[response tokens of these samples]`.
    """

    samples: tuple[int, ...]
    values: Floats


@dataclass(frozen=True)
class TrainingColumns:
    """What policy and critic train on, beside the tokens. Each is float32 `[response tokens]` of some shards in a row.

    Attributes:
        old_logprobs: of the policy before the update.
        values: of the critic before the update.
        advantages: before whitening.
        returns: what the critic learns.
    """

    old_logprobs: Floats
    values: Floats
    advantages: Floats
    returns: Floats

    @classmethod
    def concat(cls, parts: Sequence["TrainingColumns"]) -> "TrainingColumns":
        """Columns of several shards, in order."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def take(self, places: NDArray[np.int64]) -> "TrainingColumns":
        """Some of the places."""
        return TrainingColumns(*(getattr(self, name)[places] for name in self.__dataclass_fields__))
