"""Numbers per response token that roles add to a shard, as they travel between actors."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.trajectory import Floats, TrajectoryBatch, take_rows


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
class Columns:
    """Named columns of some samples, each float32 `[response tokens]`, None where nobody asked for it.

    Attributes:
        old_logprobs: of the policy before the update.
        engine_logprobs: of the engine that sampled.
        reference_logprobs: of the reference model.
        values: of the critic before the update.
        advantages: before whitening.
        returns: what the critic learns.
        loss_mask: bool; False for what is context and no action of the policy, which nothing is learnt from.
    """

    old_logprobs: Floats | None = None
    engine_logprobs: Floats | None = None
    reference_logprobs: Floats | None = None
    values: Floats | None = None
    advantages: Floats | None = None
    returns: Floats | None = None
    loss_mask: NDArray[np.bool_] | None = None

    @classmethod
    def concat(cls, parts: Sequence["Columns"]) -> "Columns":
        """Columns of several shards, in order; all have the same ones."""
        there = [f.name for f in fields(cls) if getattr(parts[0], f.name) is not None]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in there})

    def take(self, places: NDArray[np.int64]) -> "Columns":
        """Some of the places."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return Columns(**{name: column[places] for name, column in found.items() if column is not None})


@dataclass(frozen=True)
class TrainingShard:
    """Trajectories with the columns that are trained on; what one rank that trains fetches at a time.

    Attributes:
        batch: of some generated shards in a row.
        columns: of the same samples.
    """

    batch: TrajectoryBatch
    columns: Columns

    @classmethod
    def concat(cls, shards: Sequence["TrainingShard"]) -> "TrainingShard":
        """The samples of several shards, in order."""
        return cls(
            TrajectoryBatch.concat([shard.batch for shard in shards]),
            Columns.concat([shard.columns for shard in shards]),
        )

    def select(self, samples: Sequence[int]) -> "TrainingShard":
        """Some of the samples, in the given order."""
        return TrainingShard(
            self.batch.select(samples), self.columns.take(take_rows(self.batch.response_offsets, samples))
        )
