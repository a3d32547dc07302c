"""The run folder and everything that is written into it while a job runs."""

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from uuid import uuid4

import ray

from rlhf_ray.actors.devices import Devices
from rlhf_ray.actors.group import ActorGroup, Calls, wait_together
from rlhf_ray.actors.rollout import RolloutGroup
from rlhf_ray.actors.trained import TrainedGroup
from rlhf_ray.cluster.daemons import Terminated
from rlhf_ray.cluster.session import cluster_facts
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import dump_config
from rlhf_ray.config.number_formats import NumberFormats
from rlhf_ray.config.run import Limit, Timeouts
from rlhf_ray.models.score_scale import ScoreScale
from rlhf_ray.recovery.checkpoints import Checkpoint, CheckpointStore
from rlhf_ray.recovery.files import replace_file
from rlhf_ray.telemetry.manifest import Outcome, end_session, write_manifest
from rlhf_ray.telemetry.metrics import MetricsLog
from rlhf_ray.telemetry.progress import Progress, Silence
from rlhf_ray.telemetry.ray_metrics import RayMetrics
from rlhf_ray.telemetry.reporter import StatusReporter
from rlhf_ray.telemetry.rows import RowFile
from rlhf_ray.telemetry.samples import SamplesLog
from rlhf_ray.telemetry.status import About, Shards, without_traceback
from rlhf_ray.telemetry.trace import Span, SpanRecorder, Timeline

logger = logging.getLogger("rlhf_ray")


class RunFolder:
    """Config, manifest, metrics, samples, trace and checkpoints of one run, and its status while it is entered.

    Args:
        formats: what was chosen for `dtype: auto`, for the manifest; `config` has it in.
    """

    def __init__(self, config: Job, steps: int, formats: NumberFormats) -> None:
        self.path = Path(config.run.dir)
        self.path.mkdir(parents=True, exist_ok=True)
        self._config = config
        self.checkpoints = CheckpointStore(self.path, config.run.keep_last, config.run.keep_best)
        self.resumed = self.checkpoints.latest()
        if self.resumed is not None:
            logger.info("resuming from %s", self.resumed.folder)
        done = self.resumed.step if self.resumed else 0
        replace_file(self.path / "config.yaml", dump_config(config).encode())
        cluster = cluster_facts()
        about = About(
            status_actor=f"{config.name}-{uuid4().hex[:8]}",
            name=config.name,
            job=config.job,
            run_dir=str(self.path.absolute()),
            address=cluster["gcs_address"],
            node=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            started_s=time.time(),
            steps=steps,
        )
        write_manifest(self.path, config, cluster, sys.argv, about.status_actor, steps, formats.content())
        resume_step = done if self.resumed else None
        self._exported = RayMetrics(config.name, config.job)
        self.metrics = MetricsLog(
            self.path,
            config.run,
            config.name,
            config.model_dump(mode="json", by_alias=True),
            resume_step,
            [self._exported],
        )
        self.samples = SamplesLog(self.path, resume_step)
        self.recorder = SpanRecorder()
        self._rollout: RolloutGroup | None = None
        self._status = StatusReporter(about, self.recorder, done, shards=self._shards, export=self._exported.progress)
        self._timeline = Timeline(self.path / "timeline.json") if config.run.trace else None
        self._steps, self._done = steps, done
        self._stack = ExitStack()
        self._stack.callback(self.samples.close)
        self._stack.push(lambda kind, *_: self.metrics.close(failed=kind is not None))
        self._starting = ExitStack()

    def __enter__(self) -> Self:
        self._stack.push(lambda _, error, __: end_session(self.path, *outcome_of(error)))
        self._stack.enter_context(self._status)
        name, steps = self._config.name, self._steps
        self._stack.enter_context(Silence(name, steps, self.path, self._status.progress))
        self._starting.enter_context(self.recorder.span("start"))
        self._stack.push(self._starting)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def open_rows(self, name: str) -> RowFile:
        """A file of rows by step, taken back to the step that the run goes on from."""
        return self._stack.enter_context(RowFile(self.path / name, self.resumed.step if self.resumed else None))

    def watch(self, group: ActorGroup[Any]) -> None:
        """Show in the status what these ranks do."""
        self._status.watch(group.role, group.processes)
        if isinstance(group, RolloutGroup):
            self._rollout = group

    def unwatch(self, group: ActorGroup[Any]) -> None:
        """These ranks are about to end as planned."""
        self._status.watch(group.role, [])

    def start_progress(self) -> None:
        """Show progress from here on: the actors are up, so a step takes as long as a step takes."""
        self._starting.close()
        self._progress = self._stack.enter_context(Progress(self._config.name, self._steps, self._done))

    def collect_spans(self, groups: Sequence[ActorGroup[Any]], limit: Limit) -> list[Span]:
        """Bring in what all actors did since the last call, write the trace, and return the actors' spans."""
        calls = {group: group.drain_spans() for group in groups}
        collected: list[Span] = []
        for group, pending in calls.items():
            drained = pending.wait(limit)
            self._exported.phases(group.role, drained)
            for rank, spans in enumerate(drained):
                collected += spans
                if self._timeline is not None and spans:
                    self._timeline.add(f"{group.role}/{rank}", spans)
        own = self.recorder.drain()
        if self._timeline is not None and own:
            self._timeline.add("controller", own)
        return collected

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a step's metrics and show them."""
        self.metrics.write(step, metrics)
        self._progress.update(step, metrics)
        self._status.step_done(step, metrics)

    def checkpoint_due(self, step: int, last: bool) -> bool:
        """Whether a checkpoint belongs after this step."""
        every = self._config.run.checkpoint_every
        return last or (every > 0 and step % every == 0)

    def _shards(self) -> Shards | None:
        return None if self._rollout is None else self._rollout.shards


def outcome_of(error: BaseException | None) -> tuple[Outcome, str]:
    """How a run ended, for its manifest, and the error in words."""
    if error is None:
        return "finished", ""
    if isinstance(error, Terminated):
        return "terminated", ""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", ""
    return "failed", without_traceback(str(error)) or type(error).__name__


class Checkpointed(Protocol):
    """Ranks that write a part of each checkpoint."""

    def save(self, folder: Path) -> Calls[None]:
        """Write it."""

    def load(self, folder: Path) -> Calls[None]:
        """Read it."""


class Checkpointing:
    """Writes and reads the parts of a checkpoint that groups of trained roles hold.

    Args:
        devices: of roles that share them; None where none do.
    """

    def __init__(
        self,
        folder: RunFolder,
        parts: Mapping[str, Checkpointed],
        timeouts: Timeouts,
        devices: Devices | None = None,
    ) -> None:
        self._folder = folder
        self._parts = parts
        self._limit = timeouts.checkpoint
        self._devices = devices

    def save(self, step: int) -> None:
        """Have every role write its part. It becomes a checkpoint with `commit`."""
        folder = self._folder.checkpoints.begin(step)
        self._take_turns(lambda role: self._parts[role].save((folder / role).absolute()), f"checkpoint of step {step}")

    def commit(self, step: int, state: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """Complete the checkpoint of this step."""
        self._folder.checkpoints.commit(step, state, dict(metrics))

    def load(self, checkpoint: Checkpoint) -> None:
        """Have every role read its part."""
        folder = checkpoint.folder
        self._take_turns(lambda role: self._parts[role].load((folder / role).absolute()), f"loading {folder}")

    def export(self, role: str, *, wait: bool, scale: ScoreScale | None = None) -> None:
        """Have a role write its model in Hugging Face format to `export/`, in the background unless `wait`.

        Args:
            scale: of the scores of a reward model, where it is known.
        """
        if self._devices is not None:
            self._devices.enter("export", [role])
        group = self._parts[role]
        assert isinstance(group, TrainedGroup)
        group.start_export((self._folder.path / "export").absolute(), scale).wait(self._limit)
        if wait:
            group.finish_export().wait(self._limit)

    def _take_turns(self, work: Callable[[str], Calls[None]], what: str) -> None:
        """Roles that share devices take turns."""
        turns = [list(self._parts)] if self._devices is None else self._devices.turns(self._parts)
        for turn in turns:
            if self._devices is not None:
                self._devices.enter("checkpoint", turn)
            wait_together([work(role) for role in turn], self._limit, what)
