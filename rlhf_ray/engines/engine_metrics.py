"""What a vLLM engine tells of itself: its metrics to Prometheus, through Ray, and its queue's length to its owner."""

import sys
from statistics import median
from typing import Any

import ray.util.metrics
from vllm.v1.metrics.loggers import StatLoggerBase, StatLoggerFactory
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

# vLLM asks Ray Serve for a replica's name, which an engine here has not. Serve takes a second and pandas to import.
_serve = sys.modules.get("ray.serve")
sys.modules["ray.serve"] = None  # type: ignore[assignment]
try:
    from vllm.v1.metrics import ray_wrappers
finally:
    del sys.modules["ray.serve"]
    if _serve is not None:
        sys.modules["ray.serve"] = _serve


class EngineLoad(StatLoggerBase):
    """Requests of an engine, as its scheduler last counted them.

    Attributes:
        running: that it works on.
        waiting: for a place in its batch.
    """

    def __init__(self, *_: Any) -> None:
        self.running = 0
        self.waiting = 0

    def record(self, scheduler_stats: SchedulerStats | None, *_: Any, **__: Any) -> None:
        """Take what a step of the engine was like."""
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs

    def log_engine_initialized(self) -> None:
        """Nothing to tell."""


class EngineSeries(ray_wrappers.RayPrometheusStatLogger):
    """vLLM's series, with the time between two tokens told once for a step of the engine.

    All requests of a step get their tokens together. To tell the time for each of them would take an engine on a CPU
    some 2 % of its speed.
    """

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        *others: Any,
        **named_others: Any,
    ) -> None:
        """Tell what a step of the engine was like."""
        if iteration_stats is not None and iteration_stats.inter_token_latencies_iter:
            iteration_stats.inter_token_latencies_iter = [median(iteration_stats.inter_token_latencies_iter)]
        super().record(scheduler_stats, iteration_stats, *others, **named_others)


def stat_loggers(load: EngineLoad) -> list[StatLoggerFactory]:
    """For `AsyncLLM`: vLLM's series (`vllm_num_requests_running` and so on), and `load`."""
    # vLLM takes Ray's metrics for missing where it can't import Ray Serve, which is not needed for them.
    if ray_wrappers.ray_metrics is None:
        ray_wrappers.ray_metrics = ray.util.metrics
    return [EngineSeries, lambda config, index: load]
