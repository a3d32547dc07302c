"""The run folder and everything that is written into it while a job runs."""

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlhf_ray.actors.devices import Devices
from rlhf_ray.actors.group import ActorGroup
from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.cluster.session import cluster_facts
from rlhf_ray.config.jobs import JobConfig
from rlhf_ray.config.loading import dump_config
from rlhf_ray.models.score_scale import ScoreScale
from rlhf_ray.recovery.checkpoints import Checkpoint, CheckpointStore
from rlhf_ray.telemetry.manifest import write_manifest
from rlhf_ray.telemetry.metrics import MetricsLog
from rlhf_ray.telemetry.progress import Progress
from rlhf_ray.telemetry.rows import RowFile, replace_file
from rlhf_ray.telemetry.samples import SamplesLog
from rlhf_ray.telemetry.trace import Span, SpanRecorder, Timeline

logger = logging.getLogger("rlhf_ray")


class RunFolder:
    """Config, manifest, metrics, samples, trace and checkpoints of one run."""

    def __init__(self, config: JobConfig, steps: int) -> None:
        self.path = Path(config.run.dir)
        self.path.mkdir(parents=True, exist_ok=True)
        self._config = config
        self.checkpoints = CheckpointStore(self.path, config.run.keep_last, config.run.keep_best)
        self.resumed = self.checkpoints.latest()
        if self.resumed is not None:
            logger.info("resuming from %s", self.resumed.folder)
        done = self.resumed.step if self.resumed else 0
        replace_file(self.path / "config.yaml", dump_config(config).encode())
        write_manifest(self.path, config, cluster_facts(), sys.argv)
        resume_step = done if self.resumed else None
        self.metrics = MetricsLog(self.path, config.run, config.name, config.model_dump(mode="json"), resume_step)
        self.samples = SamplesLog(self.path, resume_step)
        self.recorder = SpanRecorder()
        self._timeline = Timeline(self.path / "timeline.json") if config.run.trace else None
        self._steps, self._done = steps, done
        self._stack = ExitStack()
        self._stack.callback(self.samples.close)
        self._stack.push(lambda kind, *_: self.metrics.close(failed=kind is not None))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def open_rows(self, name: str) -> RowFile:
        """A file of rows by step, taken back to the step that the run goes on from."""
        return self._stack.enter_context(RowFile(self.path / name, self.resumed.step if self.resumed else None))

    def start_progress(self) -> None:
        """Show progress from here on: the actors are up, so a step takes as long as a step takes."""
        self._progress = self._stack.enter_context(Progress(self._config.name, self._steps, self._done))

    def collect_spans(self, groups: Sequence[ActorGroup], timeout_s: float) -> list[Span]:
        """Bring in what all actors did since the last call, write the trace, and return the actors' spans."""
        refs = {group: group.call("drain_spans") for group in groups}
        collected: list[Span] = []
        for group, pending in refs.items():
            drained = wait_all(pending, timeout_s, f"{group.role}: drain_spans", "run.timeouts.setup_s")
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

    def checkpoint_due(self, step: int, last: bool) -> bool:
        """Whether a checkpoint belongs after this step."""
        every = self._config.run.checkpoint_every
        return last or (every > 0 and step % every == 0)


class Checkpointing:
    """Writes and reads the parts of a checkpoint that groups of trained roles hold.

    Args:
        devices: of roles that share them; None where none do.
    """

    def __init__(
        self,
        folder: RunFolder,
        trained: Mapping[str, ActorGroup],
        timeout_s: float,
        devices: Devices | None = None,
    ) -> None:
        self._folder = folder
        self._trained = trained
        self._timeout_s = timeout_s
        self._devices = devices

    def save(self, step: int) -> None:
        """Have every role write its part. It becomes a checkpoint with `commit`."""
        self._each_role("save", self._folder.checkpoints.begin(step), f"checkpoint of step {step}")

    def commit(self, step: int, state: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """Complete the checkpoint of this step."""
        self._folder.checkpoints.commit(step, state, dict(metrics))

    def load(self, checkpoint: Checkpoint) -> None:
        """Have every role read its part."""
        self._each_role("load", checkpoint.folder, f"loading {checkpoint.folder}")

    def export(self, role: str, *, wait: bool, scale: ScoreScale | None = None) -> None:
        """Have a role write its model in Hugging Face format to `export/`, in the background unless `wait`.

        Args:
            scale: of the scores of a reward model, where it is known.
        """
        if self._devices is not None:
            self._devices.enter("export", [role])
        group = self._trained[role]
        target, setting = str((self._folder.path / "export").absolute()), "run.timeouts.checkpoint_s"
        group.run("start_export", target, scale, timeout_s=self._timeout_s, setting=setting)
        if wait:
            group.run("finish_export", timeout_s=self._timeout_s, setting=setting)

    def _each_role(self, method: str, place: Path, what: str) -> None:
        """Roles that share devices take turns."""
        turns = [list(self._trained)] if self._devices is None else self._devices.turns(self._trained)
        for turn in turns:
            if self._devices is not None:
                self._devices.enter("checkpoint", turn)
            refs = [ref for role in turn for ref in self._trained[role].call(method, str((place / role).absolute()))]
            wait_all(refs, self._timeout_s, what, "run.timeouts.checkpoint_s")
