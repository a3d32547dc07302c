"""Losses and statistics of micro-batches, kept where they were computed until the step needs them as numbers.

To read a number from a GPU is to wait until all is done that the GPU was given, while it is given nothing new. So the
numbers of all micro-batches of a step are read at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from rlhf_ray.telemetry.metrics import Mean, sum_means

Number = torch.Tensor | float


@dataclass(frozen=True)
class DeviceMean:
    """A `Mean` of a micro-batch.

    Attributes:
        total: sum of the values, each times its weight; a tensor `[]`, or a number.
        weight: sum of the weights, likewise.
    """

    total: Number
    weight: Number

    @property
    def value(self) -> float:
        """As `Mean.value`; waits for the device."""
        return Mean(float(self.total), float(self.weight)).value


MicroStats = Mapping[str, DeviceMean]


@dataclass
class StepNumbers:
    """What the micro-batches of a step gave."""

    _losses: list[torch.Tensor] = field(default_factory=list)
    _stats: list[MicroStats] = field(default_factory=list)

    def add(self, stats: MicroStats, loss: torch.Tensor | None = None) -> None:
        """Take those of one micro-batch."""
        self._stats.append(stats)
        if loss is not None:
            self._losses.append(loss.detach())

    def read(self) -> tuple[list[float], dict[str, Mean]]:
        """The losses, and the sum of the statistics, added in the order in which they came."""
        numbers = [
            *self._losses,
            *(number for stats in self._stats for mean in stats.values() for number in (mean.total, mean.weight)),
        ]
        on_device = [number.detach().double().view(()) for number in numbers if torch.is_tensor(number)]
        read = iter(torch.stack(on_device).tolist() if on_device else [])
        values = [next(read) if torch.is_tensor(number) else number for number in numbers]
        rest = iter(values[len(self._losses) :])
        parts = [{name: Mean(next(rest), next(rest)) for name in stats} for stats in self._stats]
        return values[: len(self._losses)], sum_means(parts)


def read_stats(stats: MicroStats) -> dict[str, Mean]:
    """The statistics of one micro-batch as numbers."""
    numbers = StepNumbers()
    numbers.add(stats)
    return numbers.read()[1]
