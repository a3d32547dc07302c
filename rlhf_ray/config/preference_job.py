"""`job: preference`."""

from typing import Literal

from pydantic import model_validator

from rlhf_ray.config.data import ComparisonKind, PreferenceData
from rlhf_ray.config.epoch_job import EpochJob
from rlhf_ray.config.job_roles import check_unused_reference, own_model, reference_role, trained_role
from rlhf_ray.config.placement import PreferencePlacement
from rlhf_ray.config.preference import Preference
from rlhf_ray.config.roles import PhaseSpec, RoleSpec, StepShape
from rlhf_ray.config.run import EpochRun
from rlhf_ray.config.sharing import check_sharing
from rlhf_ray.config.training import Policy, PreferenceReference


class PreferenceJob(EpochJob):
    """Offline preference learning: DPO and its family."""

    definition = "rlhf_ray.controllers.preference_job:PREFERENCE"

    job: Literal["preference"]
    """The job type."""
    policy: Policy
    """The model that is trained."""
    reference: PreferenceReference = PreferenceReference()
    """The model that the policy's log-probs are compared with."""
    algorithm: Preference = Preference()
    """The algorithm."""
    data: PreferenceData
    """The pairs or labels."""
    placement: PreferencePlacement = PreferencePlacement()
    """Where actors sit."""
    run: EpochRun
    """The run."""

    @property
    def section(self) -> Policy:
        """The section of the model that learns."""
        return self.policy

    @property
    def roles(self) -> tuple[RoleSpec, ...]:
        """The policy, and the reference where a loss needs one of its own."""
        # KTO compares with mismatched answers too; where a loss couples the rows of a step, it takes all as given.
        passes = 1 if self.algorithm.kto is None else 2
        own = int(self.algorithm.couples_rows) + passes - 1
        if self.algorithm.needs_reference and self.policy_is_reference and self.reference.cache is None:
            own += passes
        model, at = own_model("policy", self.policy), self.placement
        policy = trained_role("causal", "policy", self.policy, model, at.policy, at.ranks_of("policy"), passes=own)
        if not self.algorithm.needs_reference or self.policy_is_reference:
            return (policy,)
        reference = reference_role(
            self.reference,
            model,
            at.reference,
            at.ranks_of("reference"),
            passes=0 if self.reference.cache is not None else passes,
            updated=self.reference.update_every > 0,
        )
        return policy, reference

    @property
    def folders(self) -> dict[str, str]:
        """The run's own, and the one that the reference's log-probs are kept in."""
        kept = {} if self.reference.cache is None else {"reference.cache": self.reference.cache}
        return super().folders | kept

    @property
    def step_shape(self) -> StepShape:
        """A prompt with an answer, or with two; how long the prompt is, only the data know: half, say."""
        most = self.data.max_tokens
        pairs = self.kind == "pairs"
        return StepShape(
            samples=self.rows_per_step,
            prompt=most // 2,
            response=most - most // 2,
            texts=2 if pairs else 1,
            shared_prompt=True,
        )

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        """The reference's log-probs come before each update."""
        return (
            PhaseSpec("score"),
            PhaseSpec("update", after=("score",)),
            PhaseSpec("checkpoint", after=("update",)),
            PhaseSpec("export", after=("checkpoint",)),
        )

    @property
    def kind(self) -> ComparisonKind:
        """What its rows are for."""
        return "labels" if self.algorithm.unpaired else "pairs"

    @property
    def policy_is_reference(self) -> bool:
        """Whether the reference is the policy with its adapters off, which needs no second copy of the model."""
        return self.policy.lora is not None and self.reference.from_model == "policy"

    @model_validator(mode="after")
    def _sections_agree(self) -> "PreferenceJob":
        self.check_epochs({f"eval/{name}" for name in self.algorithm.measures})
        if not self.algorithm.needs_reference:
            none = "algorithm.loss and algorithm.reference_free compare with none"
            if self.reference != PreferenceReference():
                raise ValueError(f"reference has no effect: {none}")
            if self.placement.policy.colocate == "reference":
                raise ValueError(f"placement.policy.colocate is 'reference', but {none}")
        elif self.policy_is_reference:
            check_unused_reference(self.reference, self.placement.reference)
            if self.reference.update_every:
                raise ValueError(
                    f"reference.update_every is {self.reference.update_every}, but with policy.lora the reference is "
                    "the policy with its adapters off, which stays as it is"
                )
        check_sharing(self)
        return self
