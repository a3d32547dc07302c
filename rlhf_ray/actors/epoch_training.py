"""The optimizer steps and evaluations of a job that goes over a data set in epochs."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import ray
import torch

from rlhf_ray.actors.device_means import MicroStats, StepNumbers
from rlhf_ray.actors.group import Calls
from rlhf_ray.actors.trained import Stats, Stopwatch, TrainedGroup, TrainedWorker, UpdateReport
from rlhf_ray.actors.waiting import fetch_data
from rlhf_ray.telemetry.metrics import Mean


class EpochTrainedWorker(TrainedWorker):
    """A role that learns from rows of a data set; what its loss is, the subclass says."""

    @abstractmethod
    def micro_batch_loss(self, data: Any, rows: Sequence[int]) -> tuple[torch.Tensor, MicroStats]:
        """Sum of the losses of some rows, and what to log. No rows are a dummy pass, for ZeRO-3."""

    def prepare_losses(self, data: Any, context: Any) -> None:
        """Take in what the losses of a step or an evaluation need beside the rows. Most need nothing."""

    def step(
        self,
        data: Sequence[ray.ObjectRef],
        micro_batches: Sequence[Sequence[int]],
        step_weight: float,
        context: Any = None,
    ) -> UpdateReport:
        """One optimizer step on this rank's micro-batches.

        Args:
            data: reference to the data set, in a list so that it stays in the object store.
            step_weight: what the sum of the losses is divided by: the weights of the step's rows, over all ranks.
            context: for `prepare_losses`.

        Raises:
            NonFiniteLossError: before the optimizer step.
        """
        watch = Stopwatch()
        found = fetch_data(data, "the data set")[0]
        with self.recorder.span("update"):
            self.prepare_losses(found, context)
            numbers = StepNumbers()
            for number, micro_batch in enumerate(micro_batches):
                loss, stats = self.micro_batch_loss(found, micro_batch)
                self.engine.backward(loss / step_weight, last=number == len(micro_batches) - 1)
                numbers.add(stats, loss)
            losses, means = numbers.read()
            for value, micro_batch in zip(losses, micro_batches, strict=True):
                self.check_finite("loss", value, partial(_uids, found, micro_batch))
            done = self.engine.step()
            self.check_finite(
                "gradient norm",
                done.grad_norm,
                partial(_uids, found, [row for micro in micro_batches for row in micro]),
            )
        means["grad_norm"] = Mean(done.grad_norm, 1.0)
        samples = sum(len(micro) for micro in micro_batches)
        if not self.data_slice.reports:
            means, samples = {}, 0
        return UpdateReport(means, done.lr, 1, samples, watch.seconds)

    @torch.no_grad()
    def evaluate(
        self, data: Sequence[ray.ObjectRef], micro_batches: Sequence[Sequence[int]], context: Any = None
    ) -> Stats:
        """What is logged of a step, for this rank's micro-batches and without learning from them."""
        found = fetch_data(data, "the data set")[0]
        numbers = StepNumbers()
        with self.recorder.span("evaluate"):
            self.prepare_losses(found, context)
            for micro_batch in micro_batches:
                _, stats = self.micro_batch_loss(found, micro_batch)
                numbers.add(stats)
            _, means = numbers.read()
        return means if self.data_slice.reports else {}


EpochTrainedT = TypeVar("EpochTrainedT", bound=EpochTrainedWorker)
RowPlan = Sequence[tuple[list[ray.ObjectRef], list[list[int]]]]
"""For each data-parallel rank, a reference to a data set, in a list so that it stays in the object store, and the rows
of each of its micro-batches."""


class EpochTrainedGroup(TrainedGroup[EpochTrainedT]):
    """The ranks of a model that learns from rows of a data set."""

    def step(self, plan: RowPlan, step_weight: float, context: Any) -> Calls[UpdateReport]:
        """One optimizer step."""
        return self.call_each(EpochTrainedWorker.step, [(*mine, step_weight, context) for mine in plan])

    def evaluate(self, plan: RowPlan, context: Any) -> Calls[Stats]:
        """What is logged of a step, without learning."""
        return self.call_each(EpochTrainedWorker.evaluate, [(*mine, context) for mine in plan])


def _uids(data: Any, rows: Sequence[int]) -> list[str]:
    return [data.uids[row] for row in rows]
