"""PPO runs whose step times are measured."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.common import FreshProcess, Measure, in_turns, say, spread
from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.loading import load_config
from rlhf_ray.telemetry.metrics import Metrics

PHASES = ("generate", "score", "policy_update", "critic_update", "weight_sync", "checkpoint", "uncovered")


@dataclass(frozen=True)
class MeasuredRun:
    """A run that is over.

    Attributes:
        rows: metrics of its steps but the first, which pays for warming up.
        idle: share of the time between the first weight sync and the last in which no actor had a span, what happens
            between steps included; None without a trace or with fewer than two syncs.
    """

    rows: list[Metrics]
    idle: float | None

    def mean(self, metric: str) -> float:
        """Mean over the steps that have the metric, 0 when none has."""
        values = [row[metric] for row in self.rows if metric in row]
        return sum(values) / len(values) if values else 0.0


def load_ppo(config: Path, overrides: Sequence[str]) -> PPOJob:
    """A PPO job of at least two steps."""
    job = load_config(config, overrides)
    if not isinstance(job, PPOJob) or job.run.steps < 2:
        raise SystemExit(f"{config}: a PPO job with run.steps of at least 2 is needed")
    return job


def measured_run(config: Path, overrides: Sequence[str]) -> MeasuredRun:
    """Run a config from its start in a folder of its own, which is removed afterwards."""
    from rlhf_ray.controllers.train import train
    from rlhf_ray.telemetry.metrics import read_metrics
    from rlhf_ray.telemetry.progress import setup_logging

    setup_logging()
    with TemporaryDirectory(prefix="rlhf_ray-benchmark-") as made:
        folder = Path(made)
        train(load_ppo(config, [*overrides, f"run.dir={folder}"]))
        return MeasuredRun(read_metrics(folder)[1:], _idle_share(folder / "timeline.json"))


def runs_in_turns(config: Path, settings: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[MeasuredRun]]:
    """Runs of a config by the name of their overrides, in turns, each in a process of its own."""
    runs: dict[str, list[MeasuredRun]] = {name: [] for name in settings}
    for number, name in in_turns(list(settings), rounds):
        with FreshProcess() as process:
            run = process.call(measured_run, config, settings[name])
        runs[name].append(run)
        say(f"round {number}/{rounds}, {name}: {run.mean('time/step_s'):.2f} s a step")
    return runs


def phase_seconds(runs: Sequence[MeasuredRun], phase: str) -> list[float]:
    """How long each step took for a phase, or all of `step`, if it had it."""
    return [row[f"time/{phase}_s"] for run in runs for row in run.rows if f"time/{phase}_s" in row]


def by_phase(runs: Mapping[str, Sequence[MeasuredRun]], phases: Sequence[str]) -> list[Measure]:
    """Median seconds of some phases in each kind of runs, and how steady their steps were."""
    seconds = [
        Measure(f"{phase}, {name}", median(phase_seconds(runs[name], phase)), "s") for phase in phases for name in runs
    ]
    return [*seconds, spread(*(phase_seconds(each, "step") for each in runs.values()))]


def _idle_share(timeline: Path) -> float | None:
    if not timeline.exists():
        return None
    events = json.loads(timeline.read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in events
        if event["ph"] == "X" and names[event["pid"]] != "controller"
    )
    syncs = [end for _, end, name in spans if name == "send weights"]
    if len(syncs) < 2:
        return None
    reached, idle = syncs[0], 0.0
    for start, end, _ in spans:
        idle += max(0.0, min(start, syncs[-1]) - reached)
        reached = max(reached, min(end, syncs[-1]))
    return idle / (syncs[-1] - syncs[0])
