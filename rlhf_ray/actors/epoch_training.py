"""The optimizer steps and evaluations of a job that goes over a data set in epochs."""

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import ray
import torch

from rlhf_ray.actors.device_means import MicroStats, StepNumbers
from rlhf_ray.actors.group import Calls
from rlhf_ray.actors.trained import Stats, TrainedGroup, TrainedWorker, UpdateReport
from rlhf_ray.actors.waiting import fetch_data


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
            NonFiniteLossError: as `optimizer_step`.
        """
        began = time.perf_counter()
        [found] = fetch_data(data, "the data set")

        def loss_of(rows: Sequence[int]) -> tuple[torch.Tensor, MicroStats]:
            loss, stats = self.micro_batch_loss(found, rows)
            return loss / step_weight, stats

        with self.recorder.span("update"):
            self.prepare_losses(found, context)
            _, means, lr = self.optimizer_step(micro_batches, loss_of, lambda rows: [found.uids[row] for row in rows])
        samples = sum(len(micro) for micro in micro_batches)
        if not self.data_slice.reports:
            means, samples = {}, 0
        return UpdateReport(means, lr, 1, samples, time.perf_counter() - began)

    @torch.no_grad()
    def evaluate(
        self, data: Sequence[ray.ObjectRef], micro_batches: Sequence[Sequence[int]], context: Any = None
    ) -> Stats:
        """What is logged of a step, for this rank's micro-batches and without learning from them."""
        [found] = fetch_data(data, "the data set")
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
