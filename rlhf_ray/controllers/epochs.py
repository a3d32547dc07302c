"""Jobs that go over a data set in epochs: supervised fine-tuning, reward models, preferences."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.actors.epoch_training import EpochTrainedGroup, RowPlan
from rlhf_ray.actors.group import ActorGroup
from rlhf_ray.actors.trained import NonFiniteLossError, UpdateReport
from rlhf_ray.config.jobs import EpochJob, SFTJob
from rlhf_ray.config.run import Timeouts
from rlhf_ray.controllers.diverged import TrainingDiverged, write_failed_samples
from rlhf_ray.controllers.early_stop import EarlyStop
from rlhf_ray.controllers.inputs import EpochInputs
from rlhf_ray.controllers.row_sources import LoadedRows, Split, StreamedRows, plan_rows
from rlhf_ray.controllers.run_folder import Checkpointing, RunFolder
from rlhf_ray.controllers.step_record import StepRecord
from rlhf_ray.data.streaming import ConversationStream
from rlhf_ray.models.score_scale import ScoreScale
from rlhf_ray.recovery.checkpoints import Checkpoint
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
        group: EpochTrainedGroup[Any],
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
        self.rows: LoadedRows | StreamedRows = (
            StreamedRows(config, inputs.train, folder)
            if isinstance(inputs.train, ConversationStream)
            else LoadedRows(config, inputs, inputs.train)
        )
        self.held_out = None if inputs.held_out is None else Split("eval", inputs.held_out)

    def train(self) -> None:
        """All steps from where the run stands."""
        self.restore(self.folder.resumed)
        self.folder.start_progress()
        while self.step < self.total and not self._over:
            self.train_step(self.step + 1)
        if self.early_stop is not None:
            self._go_back_to_the_best()
        if self.config.run.export:
            self._export(wait=True)

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Bring all ranks and this controller to the state of a checkpoint; without one they stay at the first."""
        if checkpoint is None:
            return
        self.checkpointing.load(checkpoint)
        self.step, self.metrics = checkpoint.step, checkpoint.metrics
        self.load_state_dict(checkpoint.state)

    def train_step(self, step: int) -> None:
        """One optimizer step, with evaluation and checkpoint when due."""
        record = StepRecord(step, self.folder.recorder)
        split, rows, of_rows = self.rows.take(step)
        lengths, weight = split.rows.lengths[rows], float(split.rows.weights[rows].sum())
        context = self.context(split, rows)
        try:
            with record.span("update"):
                reports = self.group.step(self._plan(split, rows), weight, context).wait(self._limits.update)
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
            with record.span("evaluate"):
                metrics |= self.evaluate()
            best = self.early_stop is not None and self.early_stop.is_best(metrics)
        last = last or self._over
        due = best or self.folder.checkpoint_due(step, last)
        if due:
            with record.timing("checkpoint"):
                self.checkpointing.save(step)
        metrics |= record.timings(self.folder.collect_spans(self.groups, self._limits.setup))
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
        rows = np.arange(len(self.held_out.rows))
        context = self.context(self.held_out, rows)
        calls = self.group.evaluate(self._plan(self.held_out, rows), context)
        found = reduce_means(calls.wait(self._limits.score))
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
    def groups(self) -> list[ActorGroup[Any]]:
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

    def _plan(self, split: Split, rows: NDArray[np.int64]) -> RowPlan:
        """The micro-batches of some rows for each data-parallel rank."""
        return plan_rows(split, rows, self.group.dp_size, self.config.section.engine.micro_batch_tokens)

    def _export(self, *, wait: bool) -> None:
        scale = ScoreScale.of_metrics(self.metrics)
        self.checkpointing.export(self.config.trained.name, wait=wait, scale=scale)

    @property
    def _limits(self) -> Timeouts:
        return self.config.run.timeouts
