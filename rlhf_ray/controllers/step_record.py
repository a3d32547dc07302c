"""The clock of one step of any job."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from rlhf_ray.telemetry.metrics import Metrics
from rlhf_ray.telemetry.trace import Span, SpanRecorder, uncovered_seconds


class StepRecord:
    """The clock of one step."""

    def __init__(self, step: int, recorder: SpanRecorder, kl_coef: float = 0.0) -> None:
        self.step = step
        self.recorder = recorder
        self.kl_coef = kl_coef
        self.seconds: dict[str, float] = {}
        self._began, self._began_wall = time.perf_counter(), time.time()
        self._scoring_began: float | None = None

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Record the body's seconds as `time/<phase>_s`."""
        began = time.perf_counter()
        try:
            with self.recorder.span(phase, self.step):
                yield
        finally:
            self.seconds[phase] = time.perf_counter() - began

    def span(self, phase: str) -> AbstractContextManager[None]:
        """Record the body as a span of the step, without a metric."""
        return self.recorder.span(phase, self.step)

    def scoring_started(self) -> None:
        """The first shard went to be scored."""
        if self._scoring_began is None:
            self._scoring_began = time.perf_counter()

    def scored(self) -> None:
        """All shards are scored."""
        assert self._scoring_began is not None
        self.seconds["score"] = time.perf_counter() - self._scoring_began

    def timings(self, spans: Sequence[Span]) -> Metrics:
        """`time/*` of the step; `spans` are what the actors did."""
        now = time.time()
        metrics = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        metrics["time/step_s"] = time.perf_counter() - self._began
        metrics["time/uncovered_s"] = uncovered_seconds(spans, self._began_wall, now)
        return metrics
