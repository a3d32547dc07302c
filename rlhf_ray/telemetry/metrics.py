"""Numbers of a step: reduced over ranks, then written to metrics.jsonl and the trackers."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rlhf_ray.config.run import Run
from rlhf_ray.telemetry.errors import NonFiniteError, StepOrderError, TelemetryError
from rlhf_ray.telemetry.rows import RowFile, read_rows
from rlhf_ray.telemetry.trackers import Tracker, start_trackers

logger = logging.getLogger(__name__)

Metrics = dict[str, float]


@dataclass(frozen=True)
class Mean:
    """A mean in the making; means of parts add up to the mean of the whole, whatever the sizes of the parts.

    Attributes:
        total: sum of the values, each times its weight.
        weight: sum of the weights, such as a count of tokens.
    """

    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float:
        """total / weight. Raises `TelemetryError` when there is nothing to take the mean of."""
        if self.weight == 0:
            raise TelemetryError("mean of no values: leave the metric out of this step")
        return self.total / self.weight

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)


def sum_means(parts: Iterable[Mapping[str, Mean]]) -> dict[str, Mean]:
    """Each name over all parts; not every part has every name."""
    sums: dict[str, Mean] = {}
    for part in parts:
        for name, mean in part.items():
            sums[name] = sums.get(name, Mean()) + mean
    return sums


def reduce_means(parts: Iterable[Mapping[str, Mean]]) -> Metrics:
    """The mean of each name over all parts (ranks or micro-batches); a name without any weight is left out."""
    return {name: mean.value for name, mean in sum_means(parts).items() if mean.weight}


class MetricsLog:
    """Writes each step's metrics once: to metrics.jsonl, which counts, and to the trackers that the config names.

    Args:
        run_dir: folder of the run.
        run: which trackers to write to.
        name: name of the run in the trackers.
        config: the resolved config, for the trackers.
        resume_step: step of the checkpoint that the run goes on from; None when it starts at its beginning.
        others: trackers beside those of the config.

    Raises:
        MissingTrackerError: a tracker is configured whose package is not installed.
        DamagedFileError: metrics.jsonl was changed by something else.
    """

    def __init__(
        self,
        run_dir: Path,
        run: Run,
        name: str,
        config: Mapping[str, Any],
        resume_step: int | None = None,
        others: Sequence[Tracker] = (),
    ) -> None:
        self._trackers = [*start_trackers(run_dir, run, name, config, resume_step), *others]
        self._rows = RowFile(run_dir / "metrics.jsonl", resume_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step. A tracker that fails is a warning, because the row is safe in metrics.jsonl by then.

        Raises:
            NonFiniteError: a metric is NaN or infinite; nothing was written.
            StepOrderError: this step or a later one was written before.
            TelemetryError: a metric is called `step`.
        """
        if "step" in metrics:
            raise TelemetryError("a metric is called 'step', which is the name of the row's step; rename it")
        values = {name: float(metrics[name]) for name in sorted(metrics)}
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if bad:
            raise NonFiniteError(step, bad)
        if self._rows.last_step == step:
            raise StepOrderError(self._rows.path, step, step)
        self._rows.append(step, [values])
        for tracker in self._trackers:
            _tell(tracker, step, values)

    def close(self, failed: bool = False) -> None:
        """Flush and close everything; trackers mark the run as failed or finished."""
        self._rows.close()
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            try:
                tracker.close(failed)
            except Exception:
                logger.warning("%s could not be closed; metrics.jsonl is complete", tracker, exc_info=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


def read_metrics(run_dir: Path) -> list[Metrics]:
    """The rows of metrics.jsonl, each with its `step`.

    Raises:
        FileNotFoundError: the run has not logged yet.
        DamagedFileError: metrics.jsonl was changed by something else.
    """
    return read_rows(run_dir / "metrics.jsonl")


def _tell(tracker: Tracker, step: int, values: Metrics) -> None:
    try:
        tracker.log(step, values)
    except Exception:
        logger.warning("%s did not take step %d; it is in metrics.jsonl", tracker, step, exc_info=True)
