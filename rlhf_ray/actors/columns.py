"""Numbers per response token: computed by ranks in parts, joined, and taken apart again for training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.actors.worker import DataSlice
from rlhf_ray.data.columns import ColumnPart, Columns, TrainingShard
from rlhf_ray.data.packing import plan_micro_batches
from rlhf_ray.data.trajectory import Floats, TrajectoryBatch, take_rows
from rlhf_ray.models.responses import ResponsePack
from rlhf_ray.platform import platform, to_device


def response_column(
    batch: TrajectoryBatch, data_slice: DataSlice, max_tokens: int, forward: Callable[[ResponsePack], torch.Tensor]
) -> ColumnPart:
    """A rank's slice of a column: `forward` gives numbers of a pack's response tokens, or of its samples."""
    samples: list[int] = []
    values: list[torch.Tensor] = []
    for micro_batch in micro_batches(batch, data_slice, max_tokens):
        values.append(forward(ResponsePack.of(batch, micro_batch, platform().device)).float())
        samples += micro_batch
    if not data_slice.reports:
        return ColumnPart((), np.empty(0, np.float32))
    return ColumnPart(tuple(samples), torch.cat(values).cpu().numpy())


def micro_batches(batch: TrajectoryBatch, data_slice: DataSlice, max_tokens: int) -> list[list[int]]:
    """A slice of a shard, packed. All slices have the same number of micro-batches."""
    lengths = batch.prompt_lengths + batch.response_lengths
    return plan_micro_batches(lengths, data_slice.count, max_tokens)[data_slice.index]


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
        samples: with their columns.
        place: of a sample in them, by its number in the step's batch.
    """

    samples: TrainingShard
    place: dict[int, int]

    @classmethod
    def of(
        cls,
        shards: Sequence[TrainingShard],
        starts: Sequence[int],
        samples: Sequence[int],
        advantages: Floats | None = None,
    ) -> "RankBatch":
        """Take `samples`, by number in the step's batch.

        Args:
            starts: numbers of the shards' first samples.
            advantages: of whole samples, float32 `[samples of the batch]`, for all tokens of each; None where the
                shards have a column of them.
        """
        wanted = np.asarray(sorted(samples), np.int64)
        taken = TrainingShard.concat(
            [
                shard.select((wanted[(wanted >= start) & (wanted < start + len(shard.batch))] - start).tolist())
                for shard, start in zip(shards, starts, strict=True)
            ]
        )
        if advantages is not None:
            column = np.repeat(advantages[wanted], taken.batch.response_lengths)
            taken = replace(taken, columns=replace(taken.columns, advantages=column))
        return cls(taken, {int(sample): place for place, sample in enumerate(wanted)})

    def pack(self, samples: Sequence[int]) -> tuple[ResponsePack, Columns]:
        """A micro-batch and its columns, those of the trajectories too."""
        places = [self.place[sample] for sample in samples]
        batch = self.samples.batch
        rows = take_rows(batch.response_offsets, places)
        columns = replace(
            self.samples.columns.take(rows),
            engine_logprobs=batch.engine_logprobs[rows],
            loss_mask=batch.loss_mask[rows],
        )
        return ResponsePack.of(batch, places, platform().device), columns

    def names(self, samples: Sequence[int]) -> list[str]:
        """uid and sample index of samples, for errors."""
        batch, places = self.samples.batch, [self.place[sample] for sample in samples]
        return [f"{batch.uids[place]}#{batch.sample_index[place]}" for place in places]


def on_device(column: Floats | NDArray[np.bool_] | None) -> torch.Tensor:
    """A column of a micro-batch where the model is. Raises ValueError for one that the batch has not."""
    if column is None:
        raise ValueError("this column is not among those that the algorithm asked for")
    return to_device(torch.from_numpy(np.ascontiguousarray(column)))
