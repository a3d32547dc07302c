"""The numbers of a run as Prometheus series, through Ray, whose agents every node has: its own prefix is `ray_`.

Everything comes from the driver, at the places where it is written down anyway: the metrics of a step with its row of
metrics.jsonl, the seconds of the roles' phases with the trace, the queue with the status.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.telemetry.names import METRICS, find_metric
from rlhf_ray.telemetry.status import Progress
from rlhf_ray.telemetry.trace import Span, covered_seconds
from rlhf_ray.telemetry.trackers import Tracker

PART = "<part>"

_SIGNS = str.maketrans({"−": "-", "β": "beta", "δ": "delta", "·": "*", "Σ": "sum"})


@dataclass(frozen=True)
class Series:
    """One name that Prometheus gets.

    Attributes:
        name: as it is given to Ray; scraped it begins with `ray_`, and a counter ends with `_total`.
        meaning: one line.
        tags: beside `run` and `job`, which all have.
        counter: it only grows.
    """

    name: str
    meaning: str
    tags: tuple[str, ...] = ()
    counter: bool = False

    @property
    def scraped(self) -> str:
        """The name that Prometheus knows it by."""
        return f"ray_{self.name}{'_total' if self.counter else ''}"


PHASE_SECONDS = Series(
    "rlhf_phase_seconds",
    "seconds that a rank of a role was in a phase, mean over the ranks",
    ("role", "phase"),
    counter=True,
)
SHARDS = Series("rlhf_shards", "shards of the step that goes on, by state: waiting, generating, generated", ("state",))


def series_of(metric: str) -> Series:
    """The series of an entry of METRICS: `policy/grad_norm` is `rlhf_policy_grad_norm`."""
    tags = ("part",) if metric.endswith(PART) else ()
    return Series(f"rlhf_{re.sub(r'[^a-zA-Z0-9]', '_', metric.replace(PART, 'part'))}", METRICS[metric], tags)


def in_ascii(text: str) -> str:
    """Text as Ray takes it, of which all else is a question mark."""
    return text.translate(_SIGNS).encode("ascii", "replace").decode()


def all_series() -> Iterator[Series]:
    """All that a run can export."""
    yield from map(series_of, METRICS)
    yield from (PHASE_SECONDS, SHARDS)


class RayMetrics(Tracker):
    """Sets Ray's gauges and counters from within the driver.

    Args:
        run, job: name and type of the run, tags of every series.
    """

    def __init__(self, run: str, job: str) -> None:
        self._own = {"run": in_ascii(run), "job": job}
        self._made: dict[str, Any] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take one step."""
        self._set(series_of("step"), step)
        for name, value in metrics.items():
            entry = find_metric(name)
            if entry is not None:
                part = {"part": in_ascii(name.partition("/")[2])} if entry.endswith(PART) else {}
                self._set(series_of(entry), value, **part)

    def phases(self, role: str, ranks: Sequence[Sequence[Span]]) -> None:
        """Take what each rank of a role did since the last call."""
        seconds: dict[str, float] = {}
        for spans in ranks:
            for phase in {span.name for span in spans}:
                seconds[phase] = seconds.get(phase, 0.0) + covered_seconds([s for s in spans if s.name == phase])
        for phase, total in seconds.items():
            if total > 0:  # Ray refuses to add nothing
                tags = self._own | {"role": in_ascii(role), "phase": phase}
                self._made_of(PHASE_SECONDS).inc(total / len(ranks), tags=tags)

    def progress(self, progress: Progress) -> None:
        """Take what changes within a step."""
        if progress.shards is not None:
            for state, count in vars(progress.shards).items():
                self._set(SHARDS, count, state=state)

    def close(self, failed: bool) -> None:
        """Nothing is buffered here."""

    def _set(self, series: Series, value: float, **tags: str) -> None:
        self._made_of(series).set(value, tags=self._own | tags)

    def _made_of(self, series: Series) -> Any:
        if series.name not in self._made:
            from ray.util.metrics import Counter, Gauge

            kind = Counter if series.counter else Gauge
            self._made[series.name] = kind(series.name, in_ascii(series.meaning), ("run", "job", *series.tags))
        return self._made[series.name]
