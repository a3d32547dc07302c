"""Jobs that go over a data set in epochs: supervised fine-tuning, reward models, preferences."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from rlhf_ray.actors.group import ActorGroup
from rlhf_ray.actors.trained import NonFiniteLossError, UpdateReport
from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.config.jobs import EpochJob, SFTJob
from rlhf_ray.controllers.early_stop import EarlyStop
from rlhf_ray.controllers.inputs import EpochInputs
from rlhf_ray.controllers.ppo_report import StepRecord, TrainingDiverged, write_failed_samples
from rlhf_ray.controllers.row_sources import LoadedRows, RowSource, Split, StreamedRows
from rlhf_ray.controllers.run_folder import Checkpointing, RunFolder
from rlhf_ray.data.packing import plan_micro_batches
from rlhf_ray.data.streaming import ConversationStream
from rlhf_ray.models.score_scale import ScoreScale
from rlhf_ray.telemetry.metrics import Metrics, reduce_means

logger = logging.getLogger("rlhf_ray")

# In a checkpoint's state: the run has no further steps, although it may have planned some.
ENDED = "ended"


class EpochController:
    """Runs the epochs over ranks that live elsewhere."""

    def __init__(
        self,
        config: EpochJob,
        inputs: EpochInputs,
        group: ActorGroup,
        folder: RunFolder,
        checkpointing: Checkpointing,
    ) -> None:
        self.config, self.inputs, self.group, self.folder = config, inputs, group, folder
        self.checkpointing = checkpointing
        self.step = 0
        self.total = inputs.steps
        # Of the step whose weights the ranks hold.
        self.metrics: Metrics = {}
        run = config.run
        self.early_stop = EarlyStop(run.keep_best, run.patience) if run.keep_best and run.patience else None
        self.rows: RowSource = (
            StreamedRows(config, inputs.train, folder)
            if isinstance(inputs.train, ConversationStream)
            else LoadedRows(config, inputs, inputs.train)
        )
        self.held_out = None if inputs.held_out is None else Split("eval", inputs.held_out)

    def train(self) -> None:
        """All steps from where the run stands."""
        if self.folder.resumed is not None:
            self.checkpointing.load(self.folder.resumed)
            self.step, self.metrics = self.folder.resumed.step, self.folder.resumed.metrics
            self.load_state_dict(self.folder.resumed.state)
        self.folder.start_progress()
        while self.step < self.total and not self._over:
            self.train_step(self.step + 1)
        if self.early_stop is not None:
            self._go_back_to_the_best()
        if self.config.run.export:
            self._export(wait=True)

    def train_step(self, step: int) -> None:
        """One optimizer step, with evaluation and checkpoint when due."""
        record = StepRecord(step, self.folder.recorder)
        role = self.config.role
        split, rows, of_rows = self.rows.take(step)
        lengths, weight = split.rows.lengths[rows], float(split.rows.weights[rows].sum())
        plan = plan_micro_batches(lengths, self.group.shares, role.trained.engine.micro_batch_tokens)
        context = self.context(split, rows)
        per_share = [(split.ref, [rows[micro].tolist() for micro in mine], weight, context) for mine in plan]
        try:
            with self.folder.recorder.span("update", step):
                reports = self._wait(self.group.call_each("step", per_share), "step", "update_s")
        except NonFiniteLossError as error:
            failed = [{"uid": uid, "step": step} for uid in error.samples]
            raise TrainingDiverged(step, write_failed_samples(self.folder.path, step, failed), error) from error
        self.step = step

        metrics: Metrics = {f"train/{name}": v for name, v in reduce_means([r.means for r in reports]).items()}
        metrics |= of_rows | self.after_step(step, reports)
        metrics["train/lr"] = reports[0].lr
        metrics["throughput/train_tokens_per_s"] = float(lengths.sum()) / max(report.seconds for report in reports)
        last, every = step == self.total, self.config.run.eval_every
        best = False
        if last or (every and step % every == 0):
            with self.folder.recorder.span("evaluate", step):
                metrics |= self.evaluate()
            best = self.early_stop is not None and self.early_stop.is_best(metrics)
        last = last or self._over
        due = best or self.folder.checkpoint_due(step, last)
        if due:
            with record.timing("checkpoint"):
                self.checkpointing.save(step)
        metrics |= record.timings(self.folder.collect_spans(self.groups, self.config.run.timeouts.setup_s))
        self.folder.log_step(step, metrics)
        self.metrics = metrics
        if due:
            self.checkpointing.commit(step, self.state_dict() | {ENDED: last}, metrics)
            if self.config.run.export and not last:
                self._export(wait=False)

    def evaluate(self) -> Metrics:
        """Metrics of the held-out rows, none without them."""
        if self.held_out is None:
            return {}
        context = self.context(self.held_out, np.arange(len(self.held_out.rows)))
        found = reduce_means(self.on_rows("evaluate", self.held_out, context))
        if isinstance(self.config, SFTJob):
            found["perplexity"] = math.exp(found["loss"])
        return {f"eval/{name}": value for name, value in found.items()}

    @property
    def training(self) -> Split:
        """The data set of a job that has it in memory."""
        assert isinstance(self.rows, LoadedRows)
        return self.rows.split

    @property
    def _over(self) -> bool:
        return self.early_stop is not None and self.early_stop.over

    @property
    def groups(self) -> list[ActorGroup]:
        """All roles."""
        return [self.group]

    def context(self, split: Split, rows: NDArray[np.int64]) -> Any:
        """What the losses of some rows need beside them; `prepare_losses` of the workers takes it."""
        return None

    def after_step(self, step: int, reports: Sequence[UpdateReport]) -> Metrics:
        """What follows from an optimizer step, and is logged of it."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the controller."""
        state: dict[str, Any] = {"cursor": self.rows.state_dict()}
        if self.early_stop is not None:
            state["early_stop"] = self.early_stop.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.rows.load_state_dict(state["cursor"])
        if self.early_stop is not None and "early_stop" in state:
            self.early_stop.load_state_dict(state["early_stop"])

    def _go_back_to_the_best(self) -> bool:
        """Give the ranks the weights of the best checkpoint, which is what is exported; False if they have them."""
        best = self.folder.checkpoints.best()
        if best is None or best.step == self.step:
            return False
        logger.info("the model of step %d was the best: it is exported", best.step)
        self.checkpointing.load(best)
        self.step, self.metrics = best.step, best.metrics
        return True

    def on_rows(self, method: str, split: Split, *context: Any) -> list[Any]:
        """What a method that learns nothing gives for the rows of a data set, by rank."""
        max_tokens = self.config.role.trained.engine.micro_batch_tokens
        plan = plan_micro_batches(split.rows.lengths, self.group.shares, max_tokens)
        refs = self.group.call_each(method, [(split.ref, mine, *context) for mine in plan])
        return self._wait(refs, method, "score_s")

    def _export(self, *, wait: bool) -> None:
        scale = ScoreScale.of_metrics(self.metrics)
        self.checkpointing.export(self.config.role.name, wait=wait, scale=scale)

    def _wait(self, refs: list[ray.ObjectRef], what: str, limit: str) -> list[Any]:
        timeout_s = getattr(self.config.run.timeouts, limit)
        return wait_all(refs, timeout_s, f"{self.config.role.name}: {what}", f"run.timeouts.{limit}")
