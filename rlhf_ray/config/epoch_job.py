"""What jobs over a data set have in common."""

from abc import abstractmethod
from typing import TYPE_CHECKING

from rlhf_ray.config.data import ComparisonData, ConversationData
from rlhf_ray.config.job import Job
from rlhf_ray.config.job_roles import check_lora
from rlhf_ray.config.roles import PhaseSpec, RoleSpec
from rlhf_ray.config.run import EpochRun
from rlhf_ray.config.training import TrainedModel


class EpochJob(Job):
    """A job that goes over a data set in epochs."""

    if TYPE_CHECKING:
        data: ComparisonData | ConversationData
        run: EpochRun

    @property
    @abstractmethod
    def section(self) -> TrainedModel:
        """The section of the model that learns."""

    @property
    def data_files(self) -> dict[str, str]:
        """What it trains on and is evaluated on."""
        train, held_out = self.data.train, self.data.eval
        if isinstance(train, str):
            files = {"data.train": train}
        else:
            files = {f"data.train.{index}.path": source.path for index, source in enumerate(train)}
        return files if held_out is None else files | {"data.eval": held_out}

    @property
    def rows_per_step(self) -> int:
        """Rows of the data set in one optimizer step."""
        return self.data.rows_per_step

    @property
    def trained(self) -> RoleSpec:
        """The role that learns."""
        return self.roles[0]

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        """One after the other."""
        return (
            PhaseSpec("update"),
            PhaseSpec("checkpoint", after=("update",)),
            PhaseSpec("export", after=("checkpoint",)),
        )

    def check_epochs(self, measures: set[str]) -> None:
        """`measures` are the metrics of an evaluation."""
        check_lora(self.trained, self.placement)
        for role in self.roles:  # each data-parallel rank needs a row
            role.check_sequence_parallel()
            if self.rows_per_step < role.dp_size:
                raise ValueError(f"data.rows_per_step ({self.rows_per_step}) is less than {role.dp_size_text}")
        best, patience = self.run.keep_best, self.run.patience
        if best is not None and best.metric.startswith("eval/"):
            if self.data.eval is None:
                raise ValueError(f"run.keep_best.metric is {best.metric!r}, but data.eval is not set")
            if best.metric not in measures:
                raise ValueError(
                    f"run.keep_best.metric is {best.metric!r}, but an evaluation measures {', '.join(sorted(measures))}"
                )
            if best.metric in ("eval/loss", "eval/perplexity") and best.mode == "max":
                raise ValueError(f"run.keep_best.mode is 'max', but less {best.metric} is better: set it to 'min'")
        elif patience is not None:
            raise ValueError(
                "run.patience needs run.keep_best.metric to be of the evaluation, such as eval/loss, but it is "
                f"{'not set' if best is None else repr(best.metric)}"
            )
        if patience is not None and self.run.eval_every == 0:
            raise ValueError("run.patience counts evaluations, but run.eval_every is 0: one, after the last step")
