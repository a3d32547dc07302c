"""`job: sft`."""

from typing import Literal

from pydantic import model_validator

from rlhf_ray.config.data import ConversationData
from rlhf_ray.config.epoch_job import EpochJob
from rlhf_ray.config.job_roles import own_model, trained_role
from rlhf_ray.config.placement import SFTPlacement
from rlhf_ray.config.roles import RoleSpec, StepShape
from rlhf_ray.config.run import SFTRun
from rlhf_ray.config.training import SFTPolicy


class SFTJob(EpochJob):
    """Supervised fine-tuning of a language model."""

    definition = "rlhf_ray.controllers.epoch_jobs:SFT"

    job: Literal["sft"]
    """The job type."""
    policy: SFTPolicy
    """The model that is trained."""
    data: ConversationData
    """What it learns to write."""
    placement: SFTPlacement = SFTPlacement()
    """Where actors sit."""
    run: SFTRun
    """The run."""

    @property
    def section(self) -> SFTPolicy:
        """The section of the model that learns."""
        return self.policy

    @property
    def roles(self) -> tuple[RoleSpec, ...]:
        """The language model alone."""
        model, at = own_model("policy", self.policy), self.placement
        return (trained_role("causal", "policy", self.policy, model, at.policy, at.ranks_of("policy")),)

    @property
    def step_shape(self) -> StepShape:
        """Conversations."""
        return StepShape(samples=self.rows_per_step, prompt=0, response=self.data.max_tokens)

    @model_validator(mode="after")
    def _sections_agree(self) -> "SFTJob":
        if self.data.streaming and self.run.steps is None:
            raise ValueError("data.streaming: true needs run.steps, since a stream has no length")
        if self.data.streaming and self.run.epochs != 1:
            raise ValueError(f"run.epochs ({self.run.epochs}) has no effect with data.streaming: set run.steps")
        if self.run.steps is not None and not self.data.streaming:
            raise ValueError(f"run.steps ({self.run.steps}) is for data.streaming: true; set run.epochs")
        self.check_epochs({"eval/loss", "eval/entropy", "eval/perplexity"})
        return self
