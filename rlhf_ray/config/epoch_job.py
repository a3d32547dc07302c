"""What jobs over a data set have in common."""

from abc import abstractmethod
from typing import TYPE_CHECKING

from rlhf_ray.config.data import ComparisonData, ConversationData
from rlhf_ray.config.job import Job
from rlhf_ray.config.job_roles import check_lora
from rlhf_ray.config.reward_model import RewardModel
from rlhf_ray.config.roles import PhaseSpec, RoleSpec
from rlhf_ray.config.run import EpochRun
from rlhf_ray.config.training import Policy


def train_and_eval(train: str, held_out: str | None) -> dict[str, str]:
    return {"data.train": train} | ({} if held_out is None else {"data.eval": held_out})


class EpochJob(Job):
    """A job that goes over a data set in epochs."""

    if TYPE_CHECKING:
        data: ComparisonData | ConversationData
        run: EpochRun

    @property
    @abstractmethod
    def section(self) -> Policy | RewardModel:
        """The section of the model that learns."""

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


def check_epochs(job: EpochJob, held_out: str | None, measures: set[str]) -> None:
    """`measures` are the metrics of an evaluation."""
    run = job.run
    assert job.trained.placement is not None
    check_lora(job.trained, job.trained.placement.gpus)
    for role in job.roles:  # each data-parallel rank needs a row
        role.check_sequence_parallel()
        if job.rows_per_step < role.dp_size:
            raise ValueError(f"data.rows_per_step ({job.rows_per_step}) is less than {role.dp_size_text}")
    metric = "" if run.keep_best is None else run.keep_best.metric
    if metric.startswith("eval/"):
        assert run.keep_best is not None
        if held_out is None:
            raise ValueError(f"run.keep_best.metric is {metric!r}, but data.eval is not set")
        if metric not in measures:
            raise ValueError(
                f"run.keep_best.metric is {metric!r}, but an evaluation measures {', '.join(sorted(measures))}"
            )
        if metric in ("eval/loss", "eval/perplexity") and run.keep_best.mode == "max":
            raise ValueError(f"run.keep_best.mode is 'max', but less {metric} is better: set it to 'min'")
    if run.patience is not None and not metric.startswith("eval/"):
        raise ValueError(
            "run.patience needs run.keep_best.metric to be of the evaluation, such as eval/loss, but it is "
            f"{repr(metric) if metric else 'not set'}"
        )
    if run.patience is not None and run.eval_every == 0:
        raise ValueError("run.patience counts evaluations, but run.eval_every is 0: one, after the last step")
