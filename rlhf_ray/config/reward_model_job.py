"""`job: reward_model`."""

from typing import Literal

from pydantic import model_validator

from rlhf_ray.config.data import ComparisonData, ComparisonKind
from rlhf_ray.config.epoch_job import EpochJob
from rlhf_ray.config.job_roles import own_model, trained_role
from rlhf_ray.config.placement import RewardModelPlacement
from rlhf_ray.config.reward_loss import BradleyTerry, RewardLoss
from rlhf_ray.config.roles import RoleSpec, StepShape
from rlhf_ray.config.run import EpochRun
from rlhf_ray.config.training import RewardModel


class RewardModelJob(EpochJob):
    """Training of a reward model on pairs, choices or rankings."""

    definition = "rlhf_ray.controllers.epoch_jobs:REWARD_MODEL"

    job: Literal["reward_model"]
    """The job type."""
    reward: RewardModel
    """The model that is trained."""
    loss: RewardLoss = BradleyTerry(type="bradley_terry")
    """What it learns from a row."""
    data: ComparisonData
    """The rows."""
    placement: RewardModelPlacement = RewardModelPlacement()
    """Where actors sit."""
    run: EpochRun
    """The run."""

    @property
    def section(self) -> RewardModel:
        """The section of the model that learns."""
        return self.reward

    @property
    def roles(self) -> tuple[RoleSpec, ...]:
        """The reward model alone."""
        model, at = own_model("reward", self.reward), self.placement
        return (trained_role("scalar", "reward", self.reward, model, at.reward, at.ranks_of("reward")),)

    @property
    def step_shape(self) -> StepShape:
        """Two texts of each row, as most rows have; a score of each."""
        return StepShape(samples=self.rows_per_step, prompt=0, response=self.data.max_tokens, texts=2, last_only=True)

    @property
    def kind(self) -> ComparisonKind:
        """What its rows are for."""
        return "rewards"

    @model_validator(mode="after")
    def _sections_agree(self) -> "RewardModelJob":
        self.check_epochs({"eval/loss", "eval/accuracy", "eval/margin"})
        return self
