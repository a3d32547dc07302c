"""Numbers per response token: computed by ranks in parts, joined, and taken apart again for training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_ray.actors.worker import Share
from rlhf_ray.algorithms.moments import Moments
from rlhf_ray.algorithms.value_loss import ExplainedVariance
from rlhf_ray.data.columns import ColumnPart, TrainingColumns
from rlhf_ray.data.packing import plan_micro_batches
from rlhf_ray.data.trajectory import Floats, TrajectoryBatch, offsets_of, take_rows
from rlhf_ray.models.responses import ResponsePack
from rlhf_ray.platform import platform, to_device


@dataclass(frozen=True)
class PortionReport:
    """What the controller needs to know of a portion's columns.

    Attributes:
        advantages: moments, for whitening over the whole batch.
        explained_variance: of the returns by the critic's values.
        kl: KL to the reference per response in nats (k1, summed over tokens), `[samples]`.
        mismatch: sum over tokens of |engine's log-prob − trainer's|.
    """

    advantages: Moments
    explained_variance: ExplainedVariance
    kl: Floats
    mismatch: float


def response_column(
    batch: TrajectoryBatch, share: Share, max_tokens: int, forward: Callable[[ResponsePack], torch.Tensor]
) -> ColumnPart:
    """A rank's share of a column: `forward` gives float32 `[response tokens]` for each pack."""
    samples: list[int] = []
    values: list[torch.Tensor] = []
    for micro_batch in micro_batches(batch, share, max_tokens):
        values.append(forward(ResponsePack.of(batch, micro_batch, platform().device)).float())
        samples += micro_batch
    if not share.reports:
        return ColumnPart((), np.empty(0, np.float32))
    return ColumnPart(tuple(samples), torch.cat(values).cpu().numpy())


def micro_batches(batch: TrajectoryBatch, share: Share, max_tokens: int) -> list[list[int]]:
    """A share of a shard, packed. All shares have the same number of micro-batches."""
    return plan_micro_batches(batch.prompt_lengths + batch.response_lengths, share.count, max_tokens)[share.number]


def assemble(parts: Sequence[ColumnPart], batch: TrajectoryBatch) -> torch.Tensor:
    """The whole column of a shard from its ranks' parts, float32 `[response tokens]`."""
    column = np.full(len(batch.response_tokens), np.nan, np.float32)
    for part in parts:
        column[take_rows(batch.response_offsets, part.samples)] = part.values
    return torch.from_numpy(column)


@dataclass(frozen=True)
class RankBatch:
    """The samples that one rank trains on, with their columns.

    Attributes:
        number: place of a sample in `batch`, by its number in the PPO batch.
    """

    batch: TrajectoryBatch
    columns: TrainingColumns
    number: dict[int, int]

    @classmethod
    def of(
        cls,
        portions: Sequence[tuple[TrajectoryBatch, TrainingColumns]],
        starts: Sequence[int],
        samples: Sequence[int],
    ) -> "RankBatch":
        """Take `samples`, by number in the PPO batch; `starts` are the numbers of the portions' first samples."""
        wanted = np.asarray(sorted(samples), np.int64)
        batches, columns = [], []
        for (batch, found), start in zip(portions, starts, strict=True):
            rows = wanted[(wanted >= start) & (wanted < start + len(batch))] - start
            batches.append(batch.select(rows.tolist()))
            columns.append(found.take(take_rows(batch.response_offsets, rows)))
        return cls(
            TrajectoryBatch.concat(batches),
            TrainingColumns.concat(columns),
            {int(sample): place for place, sample in enumerate(wanted)},
        )

    def pack(self, samples: Sequence[int]) -> tuple[ResponsePack, TrainingColumns]:
        """A micro-batch and its columns."""
        places = [self.number[sample] for sample in samples]
        rows = take_rows(self.batch.response_offsets, places)
        return ResponsePack.of(self.batch, places, platform().device), self.columns.take(rows)

    def names(self, samples: Sequence[int]) -> list[str]:
        """uid and sample index of samples, for errors."""
        places = [self.number[sample] for sample in samples]
        return [f"{self.batch.uids[place]}#{self.batch.sample_index[place]}" for place in places]


def on_device(column: Floats) -> torch.Tensor:
    """A column of a micro-batch where the model is."""
    return to_device(torch.from_numpy(np.ascontiguousarray(column)))


def column_offsets(batch: TrajectoryBatch) -> torch.Tensor:
    """Response offsets as the algorithms take them, int64 `[samples + 1]`."""
    return torch.from_numpy(offsets_of(batch.response_lengths))
