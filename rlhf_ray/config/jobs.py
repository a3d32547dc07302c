"""The job types: what a config file as a whole may say, and which of its sections conflict."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.algorithm import PPO
from rlhf_ray.config.base import MOST_ROWS, Section
from rlhf_ray.config.data import ComparisonData, ComparisonKind, ConversationData, PreferenceData, PromptData
from rlhf_ray.config.paths import UsablePath
from rlhf_ray.config.placement import (
    Cluster,
    Placed,
    PPOPlacement,
    PreferencePlacement,
    RewardModelPlacement,
    RolePlacement,
    SFTPlacement,
)
from rlhf_ray.config.preference import Preference
from rlhf_ray.config.reward_loss import BradleyTerry, RewardLoss
from rlhf_ray.config.rewards import ModelReward, RewardPart, part_name
from rlhf_ray.config.rollout import Rollout
from rlhf_ray.config.run import EpochRun, PPORun, SFTRun
from rlhf_ray.config.shares import Shares
from rlhf_ray.config.sharing import check_sharing
from rlhf_ray.config.training import (
    Critic,
    Lora,
    Policy,
    PreferenceReference,
    Reference,
    ScoringEngine,
    SFTPolicy,
    SupervisedOptimizer,
    TrainingEngine,
)

TRAINED: tuple[Literal["policy", "critic"], ...] = ("policy", "critic")
MAX_ENGINE_RANK = 512
"""Largest rank of an adapter that vLLM applies."""


def shard_count(samples: int, shard_samples: int) -> int:
    """Shards that `samples` are cut into."""
    return -(-samples // shard_samples)


class _Job(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=100)
    """Name of the run, in telemetry and Ray."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random."""
    cluster: Cluster = Cluster()
    """The Ray cluster."""


class PPOJob(_Job):
    """Reinforcement learning: policy, critic, reference, reward and rollout engines as Ray actors."""

    job: Literal["ppo"]
    """The job type."""
    policy: Policy
    """The model that is trained."""
    critic: Critic = Critic()
    """The value model."""
    reference: Reference = Reference()
    """The model that the KL penalty is measured against."""
    reward: tuple[RewardPart, ...]
    """Parts of the reward; the score is their weighted sum."""
    rollout: Rollout = Rollout()
    """Generation."""
    algorithm: PPO = PPO()
    """The algorithm."""
    data: PromptData
    """Prompts."""
    placement: PPOPlacement = PPOPlacement()
    """Where actors sit."""
    run: PPORun
    """The run."""

    @property
    def samples_per_step(self) -> int:
        """Responses in one PPO step."""
        return self.data.prompts_per_step * self.data.samples_per_prompt

    @property
    def max_prompt_tokens(self) -> int:
        """Budget of a prompt: the configured one, else what the engine's length leaves beside a response."""
        room = self.rollout.engine.max_model_len - self.rollout.sampling.max_new_tokens
        return room if self.data.max_prompt_tokens is None else self.data.max_prompt_tokens

    @property
    def reward_models(self) -> list[ModelReward]:
        """The parts of the reward that are models, in order."""
        return [part for part in self.reward if isinstance(part, ModelReward)]

    @property
    def policy_is_reference(self) -> bool:
        """The policy with its adapters off is the reference, so there are no actors for one."""
        return self.policy.lora is not None and self.reference.from_model == "policy"

    @property
    def places(self) -> dict[str, Placed]:
        """The roles that have actors; each reward model is a group of its own."""
        groups = {
            "policy": 1,
            "critic": 1,
            "reference": 0 if self.policy_is_reference else 1,
            "reward": len(self.reward_models),
            "rollout": 1,
        }
        return {role: Placed(getattr(self.placement, role), count) for role, count in groups.items() if count}

    @property
    def shares(self) -> list[Shares]:
        """What each model deals samples into; policy and critic come first."""
        ranks = self.placement.ranks_of
        found = [
            Shares(f"placement.{role}.ranks", ranks(role), f"{role}.engine", getattr(self, role).engine)
            for role in TRAINED
        ]
        if not self.policy_is_reference:
            found.append(
                Shares("placement.reference.ranks", ranks("reference"), "reference.engine", self.reference.engine)
            )
        for index, part in enumerate(self.reward):
            if isinstance(part, ModelReward):
                found.append(Shares("placement.reward.ranks", ranks("reward"), f"reward.{index}.engine", part.engine))
        return found

    @model_validator(mode="after")
    def _sections_agree(self) -> "PPOJob":
        if not self.reward:
            raise ValueError("reward: needs at least one part")
        if self.samples_per_step > MOST_ROWS:
            raise ValueError(
                f"data.prompts_per_step ({self.data.prompts_per_step}) × data.samples_per_prompt "
                f"({self.data.samples_per_prompt}) is more than the {MOST_ROWS:,} samples that a step may have"
            )
        prompt, new = self.max_prompt_tokens, self.rollout.sampling.max_new_tokens
        if prompt + new > self.rollout.engine.max_model_len:
            raise ValueError(
                f"data.max_prompt_tokens ({prompt}) + rollout.sampling.max_new_tokens ({new}) is more than "
                f"rollout.engine.max_model_len ({self.rollout.engine.max_model_len})"
            )
        if self.rollout.sampling.temperature == 0:
            raise ValueError(
                "rollout.sampling.temperature is 0 (greedy), which gives no probabilities for job: ppo to learn from"
            )
        names = [part_name(part) for part in self.reward]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"reward.{index} and reward.{names.index(name)} are both named {name!r}: set name")
            if name in ("mean", "std"):
                raise ValueError(f"reward.{index}.name: {name!r} is the name of a metric of the sum; choose another")
        if not any(part.weight for part in self.reward):
            raise ValueError("every reward.N.weight is 0: there is nothing to learn")
        if self.critic.init_from == "reward" and not self.reward_models:
            raise ValueError(
                "critic.init_from is 'reward', but reward has no part with a model: name a model folder in "
                "critic.init_from"
            )
        for shares in self.shares:
            shares.check()
        for shares in self.shares[: len(TRAINED)]:
            if self.samples_per_step // self.algorithm.optimizer_steps < shares.count:
                raise ValueError(
                    f"data.prompts_per_step × data.samples_per_prompt ({self.samples_per_step}) split into "
                    f"algorithm.optimizer_steps ({self.algorithm.optimizer_steps}) gives fewer samples than {shares}"
                )
        if self.algorithm.kl.target is not None and self.algorithm.kl.horizon <= 0.2 * self.samples_per_step:
            raise ValueError(
                f"algorithm.kl.horizon ({self.algorithm.kl.horizon}) must be more than a fifth of "
                f"data.prompts_per_step × data.samples_per_prompt ({self.samples_per_step}), or one step could turn "
                "β negative"
            )
        shards = shard_count(self.samples_per_step, self.rollout.shard_samples)
        for shares in self.shares:
            if shares.engine.zero_stage == 3 and self.samples_per_step // shards < shares.count:
                raise ValueError(
                    f"rollout.shard_samples ({self.rollout.shard_samples}) cuts {self.samples_per_step} samples into "
                    f"shards of {self.samples_per_step // shards}, fewer than {shares}, which all work on each shard "
                    f"because {shares.engine_key}.zero_stage is 3"
                )
        gpus = {role: self.placement.gpus_of(role) for role in ("policy", "rollout")}
        if (gpus["rollout"] > 0) != (gpus["policy"] > 0):
            raise ValueError(
                f"placement.policy.gpus ({gpus['policy']:g}) and placement.rollout.gpus ({gpus['rollout']:g}) "
                "must both be 0 or both not: weights travel over one kind of device"
            )
        if self.algorithm.critic_warmup_steps >= self.run.steps:
            raise ValueError(
                f"algorithm.critic_warmup_steps ({self.algorithm.critic_warmup_steps}) leaves no step of "
                f"run.steps ({self.run.steps}) in which the policy learns"
            )
        for role in TRAINED:
            _check_lora(role, getattr(self, role), self.placement.gpus_of(role))
        if self.rollout.lora_sync == "adapters":
            if self.policy.lora is None:
                raise ValueError("rollout.lora_sync is 'adapters', but policy.lora is not set: there are none to send")
            if self.policy.lora.rank > MAX_ENGINE_RANK:
                raise ValueError(
                    f"rollout.lora_sync is 'adapters', but policy.lora.rank ({self.policy.lora.rank}) is more than the "
                    f"{MAX_ENGINE_RANK} that vLLM takes: lower it, or set rollout.lora_sync to 'merged'"
                )
            if self.placement.rollout.parts > 1:
                raise ValueError(
                    "rollout.lora_sync is 'adapters', which workers read from a folder of their node, but "
                    f"placement.rollout.parts is {self.placement.rollout.parts}: set rollout.lora_sync to 'merged'"
                )
            if self.policy.lora.base == "nf4":
                raise ValueError(
                    "rollout.lora_sync is 'adapters', but policy.lora.base is 'nf4': the engines' base model is not "
                    "quantised, so it is another than the trainer's; set rollout.lora_sync to 'merged'"
                )
        if self.policy_is_reference:
            _check_unused_reference(self.reference, self.placement.reference)
        engines: dict[str, tuple[TrainingEngine | ScoringEngine, ...]] = {
            "policy": (self.policy.engine,),
            "critic": (self.critic.engine,),
            "reference": (self.reference.engine,),
            "reward": tuple(part.engine for part in self.reward_models),
        }
        check_sharing(self.places, engines, offload_idle=self.placement.offload_idle)
        return self


class RewardModel(Section):
    """The model that learns to score."""

    model: UsablePath
    """Folder of a causal language model, which gets a new scalar head, or of a reward model to train on."""
    trust_remote_code: bool = False
    """Run Python code that comes with this model. Off unless you have read that code."""
    engine: TrainingEngine = TrainingEngine()
    """How it is held and trained."""
    lora: Lora | None = None
    """Train low-rank adapters beside frozen weights; by default all weights are trained."""
    optimizer: SupervisedOptimizer = SupervisedOptimizer()
    """How it is updated."""


@dataclass(frozen=True)
class EpochRole:
    """The role of a job that goes over a data set in epochs.

    Attributes:
        name: of the role.
        trained: its model.
        placement: where its ranks sit.
        rows_per_step: rows of the data set in one optimizer step.
    """

    name: Literal["policy", "reward"]
    trained: RewardModel | Policy
    placement: RolePlacement
    rows_per_step: int

    @property
    def ranks(self) -> int:
        """Processes that train the model."""
        return self.placement.ranks or 1

    @property
    def shares(self) -> Shares:
        """What its rows are dealt into."""
        return Shares(f"placement.{self.name}.ranks", self.ranks, f"{self.name}.engine", self.trained.engine)


class RewardModelJob(_Job):
    """Training of a reward model on pairs, choices or rankings."""

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
    def role(self) -> EpochRole:
        """The one role."""
        return EpochRole("reward", self.reward, self.placement.reward, self.data.rows_per_step)

    @property
    def places(self) -> dict[str, Placed]:
        """The one role, which has actors."""
        return {"reward": Placed(self.placement.reward, 1)}

    @property
    def kind(self) -> ComparisonKind:
        """What its rows are for."""
        return "rewards"

    @model_validator(mode="after")
    def _sections_agree(self) -> "RewardModelJob":
        _check_epochs(
            self.role,
            self.run,
            self.data.eval,
            {"eval/loss", "eval/accuracy", "eval/margin"},
        )
        return self


class SFTJob(_Job):
    """Supervised fine-tuning of a language model."""

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
    def role(self) -> EpochRole:
        """The one role."""
        return EpochRole("policy", self.policy, self.placement.policy, self.data.rows_per_step)

    @property
    def places(self) -> dict[str, Placed]:
        """The one role, which has actors."""
        return {"policy": Placed(self.placement.policy, 1)}

    @model_validator(mode="after")
    def _sections_agree(self) -> "SFTJob":
        if self.data.streaming and self.run.steps is None:
            raise ValueError("data.streaming: true needs run.steps, since a stream has no length")
        if self.data.streaming and self.run.epochs != 1:
            raise ValueError(f"run.epochs ({self.run.epochs}) has no effect with data.streaming: set run.steps")
        if self.run.steps is not None and not self.data.streaming:
            raise ValueError(f"run.steps ({self.run.steps}) is for data.streaming: true; set run.epochs")
        _check_epochs(
            self.role,
            self.run,
            self.data.eval,
            {"eval/loss", "eval/entropy", "eval/perplexity"},
        )
        return self


class PreferenceJob(_Job):
    """Offline preference learning: DPO and its family."""

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
    def role(self) -> EpochRole:
        """The role that is trained."""
        return EpochRole("policy", self.policy, self.placement.policy, self.data.rows_per_step)

    @property
    def places(self) -> dict[str, Placed]:
        """The roles that have actors."""
        policy = {"policy": Placed(self.placement.policy, 1)}
        if not self.algorithm.needs_reference or self.policy_is_reference:
            return policy
        return policy | {"reference": Placed(self.placement.reference, 1)}

    @property
    def kind(self) -> ComparisonKind:
        """What its rows are for."""
        return "labels" if self.algorithm.unpaired else "pairs"

    @property
    def reference_model(self) -> str:
        """Folder of the reference model."""
        return self.policy.model if self.reference.from_model == "policy" else self.reference.from_model

    @property
    def policy_is_reference(self) -> bool:
        """Whether the reference is the policy with its adapters off, which needs no second copy of the model."""
        return self.policy.lora is not None and self.reference.from_model == "policy"

    @model_validator(mode="after")
    def _sections_agree(self) -> "PreferenceJob":
        measures = {f"eval/{name}" for name in self.algorithm.measures}
        _check_epochs(self.role, self.run, self.data.eval, measures)
        if not self.algorithm.needs_reference and self.reference != PreferenceReference():
            raise ValueError("reference has no effect: algorithm.loss and algorithm.reference_free compare with none")
        if self.algorithm.needs_reference and self.policy_is_reference:
            _check_unused_reference(self.reference, self.placement.reference)
            if self.reference.update_every:
                raise ValueError(
                    f"reference.update_every is {self.reference.update_every}, but with policy.lora the reference is "
                    "the policy with its adapters off, which stays as it is"
                )
        engines: dict[str, tuple[TrainingEngine | ScoringEngine, ...]] = {
            "policy": (self.policy.engine,),
            "reference": (self.reference.engine,),
        }
        check_sharing(self.places, engines, offload_idle=self.placement.offload_idle)
        if self.algorithm.needs_reference and not self.policy_is_reference:
            ranks, engine = self.placement.reference_ranks, self.reference.engine
            _check_shares(Shares("placement.reference.ranks", ranks, "reference.engine", engine), self.role)
        return self


def _check_unused_reference(reference: Reference, placement: RolePlacement) -> None:
    """With LoRA the policy is the reference too, which then has no engine and no place of its own."""
    unused = {
        "reference.engine": reference.engine != ScoringEngine(),
        "placement.reference": placement != PPOPlacement().reference,
    }
    for path in (path for path, is_set in unused.items() if is_set):
        raise ValueError(
            f"{path} has no effect beside policy.lora: the policy with its adapters off is the reference. Leave it "
            "out, or name a model folder in reference.from"
        )


def _check_lora(role: str, section: Policy | Critic | RewardModel, gpus: float) -> None:
    if section.lora is None or section.lora.base == "as_model":
        return
    if section.engine.zero_stage == 3:
        raise ValueError(
            f"{role}.lora.base is {section.lora.base!r}, which ZeRO can't shard, but {role}.engine.zero_stage is 3"
        )
    if not gpus:
        raise ValueError(
            f"{role}.lora.base is {section.lora.base!r}, which needs a GPU, but placement.{role}.gpus is 0"
        )


def _check_epochs(role: EpochRole, run: EpochRun, held_out: str | None, measures: set[str]) -> None:
    """`measures` are the metrics of an evaluation."""
    _check_lora(role.name, role.trained, role.placement.gpus)
    _check_shares(role.shares, role)
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


def _check_shares(shares: Shares, role: EpochRole) -> None:
    """Each share of the ranks needs a row."""
    shares.check()
    if role.rows_per_step < shares.count:
        raise ValueError(f"data.rows_per_step ({role.rows_per_step}) is less than {shares}")


EpochJob = PreferenceJob | RewardModelJob | SFTJob

JobConfig = PPOJob | PreferenceJob | RewardModelJob | SFTJob

JOB_TYPES: dict[str, type[PPOJob] | type[PreferenceJob] | type[RewardModelJob] | type[SFTJob]] = {
    "ppo": PPOJob,
    "preference": PreferenceJob,
    "reward_model": RewardModelJob,
    "sft": SFTJob,
}
