"""The job types: what a config file as a whole may say, and which of its sections conflict."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.algorithm import PPO
from rlhf_ray.config.base import MOST_ROWS, Section
from rlhf_ray.config.data import ComparisonData, ComparisonKind, ConversationData, PreferenceData, PromptData
from rlhf_ray.config.paths import UsablePath
from rlhf_ray.config.placement import (
    Cluster,
    JobPlacement,
    PPOPlacement,
    PreferencePlacement,
    RewardModelPlacement,
    RolePlacement,
    RolloutPlacement,
    SFTPlacement,
)
from rlhf_ray.config.plugs import ESTIMATORS, Estimator, choose
from rlhf_ray.config.preference import Preference
from rlhf_ray.config.reward_loss import BradleyTerry, RewardLoss
from rlhf_ray.config.rewards import FunctionReward, ModelReward, RewardPart, part_name
from rlhf_ray.config.roles import Level, ModelSource, PhaseSpec, RoleKind, RoleSpec, StepShape
from rlhf_ray.config.rollout import Rollout, shard_count
from rlhf_ray.config.run import EpochRun, PPORun, Run, SFTRun
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

MAX_ENGINE_RANK = 512
"""Largest rank of an adapter that vLLM applies."""


class Job(Section):
    """What every job has. A job type adds its sections and declares its roles and the phases of its step."""

    definition: ClassVar[str]
    """Path of the `JobDefinition` (controllers/job.py) that runs it."""
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=100)
    """Name of the run, in telemetry and Ray."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random."""
    cluster: Cluster = Cluster()
    """The Ray cluster."""

    if TYPE_CHECKING:  # fields of each job type, which have their places among its sections
        job: str
        placement: JobPlacement
        run: Run

    @property
    @abstractmethod
    def roles(self) -> tuple[RoleSpec, ...]:
        """The role table, in the order in which roles are shown."""

    @property
    @abstractmethod
    def phases(self) -> tuple[PhaseSpec, ...]:
        """The phase table: the phases of a step, in order."""

    @property
    @abstractmethod
    def step_shape(self) -> StepShape:
        """How many samples or rows a step has, and how long they are at most."""

    def role(self, name: str) -> RoleSpec:
        """The row of a role. Raises KeyError for a name that is not in the table."""
        for role in self.roles:
            if role.name == name:
                return role
        raise KeyError(name)

    @property
    @abstractmethod
    def data_files(self) -> dict[str, str]:
        """Data that the controller reads, by the setting that names them."""

    @property
    def folders(self) -> dict[str, str]:
        """Folders that the controller writes, by the setting that names them."""
        return {"run.dir": self.run.dir}

    @property
    def placements(self) -> dict[str, RolePlacement | RolloutPlacement]:
        """The sections of the roles that take places in the cluster, by the name that `placement` has for them."""
        return {role.placed_as: role.placement for role in self.roles if role.placement is not None}


class PPOJob(Job):
    """Reinforcement learning: policy, critic, reference, reward and rollout engines as Ray actors."""

    definition = "rlhf_ray.controllers.ppo_job:PPO"

    job: Literal["ppo"]
    """The job type."""
    policy: Policy
    """The model that is trained."""
    critic: Critic | None = None
    """The value model. By default it is there where `algorithm.advantage` needs one, as `gae` does."""
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
    def sends_adapters(self) -> bool:
        """Engines get the policy's adapters alone, and keep its base model."""
        return self.policy.lora is not None and self.rollout.lora_sync == "adapters"

    def _critic_source(self, critic: Critic) -> ModelSource:
        trusted = critic.trust_remote_code
        if critic.init_from != "reward":
            return ModelSource("critic.init_from", critic.init_from, trusted)
        first = self.reward_models[0]
        return ModelSource(f"reward.{self.reward.index(first)}.model", first.model, trusted)

    @property
    def roles(self) -> tuple[RoleSpec, ...]:
        """Policy, critic, reference, the parts of the reward, and the engines."""
        policy = ModelSource("policy.model", self.policy.model, self.policy.trust_remote_code)
        at = self.placement
        bucket = self.rollout.sync_bucket_bytes(on_gpu=at.gpus_of("rollout") > 0)
        found = [
            RoleSpec(
                name="policy",
                kind="causal",
                section="policy",
                model=policy,
                engine=self.policy.engine,
                placed_as="policy",
                placement=at.policy,
                ranks=at.ranks_of("policy"),
                needs={
                    "score": Level.WEIGHTS,
                    "update": Level.FULL,
                    "sync": Level.WEIGHTS,
                    "checkpoint": Level.FULL,
                    "export": Level.WEIGHTS,
                },
                lora=self.policy.lora,
                trained=True,
                checkpointed=True,
                exported=True,
                score_passes=2 if self.policy_is_reference else 1,
                entropy=self.algorithm.entropy_coef > 0,
                sync_bytes=bucket,
                modules=self._policy_modules,
            ),
        ]
        if self.critic is not None:
            found.append(
                RoleSpec(
                    name="critic",
                    kind="scalar",
                    section="critic",
                    model=self._critic_source(self.critic),
                    engine=self.critic.engine,
                    placed_as="critic",
                    placement=at.critic,
                    ranks=at.ranks_of("critic"),
                    needs={"score": Level.WEIGHTS, "update": Level.FULL, "checkpoint": Level.FULL},
                    lora=self.critic.lora,
                    trained=True,
                    checkpointed=True,
                    score_passes=1,
                )
            )
        if not self.policy_is_reference:
            found.append(_reference_role(self.reference, policy, at.reference, at.ranks_of("reference"), passes=1))
        found += [self._reward_role(index, part) for index, part in enumerate(self.reward)]
        rollout = RoleSpec(
            name="rollout",
            kind="engine",
            section="rollout",
            model=policy,
            engine=self.rollout.engine,
            placed_as="rollout",
            placement=at.rollout,
            ranks=at.rollout.engines,
            needs={"generate": Level.FULL, "sync": Level.WEIGHTS},
            sync_bytes=bucket,
            adapter_rank=self.policy.lora.rank if self.policy.lora is not None and self.sends_adapters else 0,
            keeps_weights=self.sends_adapters,  # a base model for adapters is not sent again
        )
        return (*found, rollout)

    @property
    def _policy_modules(self) -> dict[str, str]:
        """That of a loss of one's own."""
        module, own, _ = self.algorithm.policy_loss.partition(":")
        return {"algorithm.policy_loss": module} if own else {}

    def _reward_role(self, index: int, part: RewardPart) -> RoleSpec:
        name, section = f"reward-{part_name(part)}", f"reward.{index}"
        if isinstance(part, ModelReward):
            return RoleSpec(
                name=name,
                kind="scalar",
                section=section,
                model=ModelSource(f"{section}.model", part.model, part.trust_remote_code),
                engine=part.engine,
                placed_as="reward",
                placement=self.placement.reward,
                ranks=self.placement.ranks_of("reward"),
                needs={"score": Level.WEIGHTS},
                score_passes=1,
            )
        modules, variables = dict[str, str](), dict[str, str]()
        if isinstance(part, FunctionReward):
            modules[f"{section}.function"] = part.function.partition(":")[0]
        elif part.token_env is not None:
            variables[f"{section}.token_env"] = part.token_env
        return RoleSpec(
            name=name,
            kind="texts",
            section=section,
            model=None,
            engine=None,
            placed_as="reward",
            placement=None,
            ranks=part.workers if isinstance(part, FunctionReward) else 1,
            needs={"score": Level.WEIGHTS},
            modules=modules,
            variables=variables,
        )

    @property
    def data_files(self) -> dict[str, str]:
        """The prompts."""
        return {"data.prompts": self.data.prompts}

    @property
    def step_shape(self) -> StepShape:
        """Responses to prompts."""
        return StepShape(
            samples=self.samples_per_step,
            prompt=self.max_prompt_tokens,
            response=self.rollout.sampling.max_new_tokens,
            samples_per_prompt=self.data.samples_per_prompt,
            optimizer_steps=self.algorithm.optimizer_steps,
            epochs=self.algorithm.epochs,
            shard=self.rollout.shard_samples,
        )

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        """A shard is scored when it is generated; all else waits for what comes before."""
        return (
            PhaseSpec("generate"),
            PhaseSpec("score"),
            PhaseSpec("update", after=("score",)),
            PhaseSpec("sync", after=("update",)),
            PhaseSpec("checkpoint", after=("sync",)),
            PhaseSpec("export", after=("checkpoint",)),
        )

    @model_validator(mode="before")
    @classmethod
    def _critic_as_the_estimator_asks(cls, raw: Any) -> Any:
        """A critic where values are needed; without one the reward models sit with the policy by default."""
        algorithm = raw.get("algorithm") if isinstance(raw, dict) else None
        name = algorithm.get("advantage", "gae") if isinstance(algorithm, dict) else "gae"
        if not isinstance(raw, dict) or not isinstance(name, str) or (":" not in name and name not in ESTIMATORS):
            return raw
        if choose("algorithm.advantage", name, ESTIMATORS, Estimator).values:
            return raw if raw.get("critic") is not None else raw | {"critic": {}}
        placement = raw.get("placement", {})
        if isinstance(placement, dict) and "reward" not in placement:
            return raw | {"placement": placement | {"reward": {"colocate": "policy"}}}
        return raw

    def _check_critic(self) -> None:
        estimator, name = self.algorithm.estimator, f"algorithm.advantage: {self.algorithm.advantage}"
        if estimator.groups and self.data.samples_per_prompt < 2:
            raise ValueError(
                f"data.samples_per_prompt is {self.data.samples_per_prompt}, but {name} compares the samples of a "
                "prompt: set it to 2 or more"
            )
        if estimator.values:
            return
        own = {"critic": self.critic is not None, "placement.critic": self.placement.critic != RolePlacement()}
        for key in (key for key, is_set in own.items() if is_set):
            raise ValueError(f"{key} has no effect with {name}, which needs no critic: leave it out")
        for role in ("policy", "reference", "reward", "rollout"):
            if self.placement.section(role).colocate == "critic":
                raise ValueError(f"placement.{role}.colocate is 'critic', but with {name} there is none")

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
        self._check_critic()
        if self.critic is not None and self.critic.init_from == "reward" and not self.reward_models:
            raise ValueError(
                "critic.init_from is 'reward', but reward has no part with a model: name a model folder in "
                "critic.init_from"
            )
        models = [role for role in self.roles if role.model_engine is not None]
        for role in models:
            role.check_sequence_parallel()
        for role in (role for role in models if role.trained):
            if self.samples_per_step // self.algorithm.optimizer_steps < role.dp_size:
                raise ValueError(
                    f"data.prompts_per_step × data.samples_per_prompt ({self.samples_per_step}) split into "
                    f"algorithm.optimizer_steps ({self.algorithm.optimizer_steps}) gives fewer samples than "
                    f"{role.dp_size_text}"
                )
        if self.algorithm.kl.target is not None and self.algorithm.kl.horizon <= 0.2 * self.samples_per_step:
            raise ValueError(
                f"algorithm.kl.horizon ({self.algorithm.kl.horizon}) must be more than a fifth of "
                f"data.prompts_per_step × data.samples_per_prompt ({self.samples_per_step}), or one step could turn "
                "β negative"
            )
        shards = shard_count(self.samples_per_step, self.rollout.shard_samples)
        for role in models:
            sharded = role.model_engine is not None and role.model_engine.zero_stage == 3
            if sharded and self.samples_per_step // shards < role.dp_size:
                raise ValueError(
                    f"rollout.shard_samples ({self.rollout.shard_samples}) cuts {self.samples_per_step} samples into "
                    f"shards of {self.samples_per_step // shards}, fewer than {role.dp_size_text}, which all work on "
                    f"each shard because {role.section}.engine.zero_stage is 3"
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
        for role in self.roles:
            _check_lora(role, self.placement.host_of(role.placed_as).gpus)
        if self.rollout.lora_sync == "adapters":
            if self.policy.lora is None:
                raise ValueError("rollout.lora_sync is 'adapters', but policy.lora is not set: there are none to send")
            if self.policy.lora.rank > MAX_ENGINE_RANK:
                raise ValueError(
                    f"rollout.lora_sync is 'adapters', but policy.lora.rank ({self.policy.lora.rank}) is more than the "
                    f"{MAX_ENGINE_RANK} that vLLM takes: lower it, or set rollout.lora_sync to 'merged'"
                )
            if (nodes := self.placement.rollout.nodes_per_engine) > 1:
                raise ValueError(
                    "rollout.lora_sync is 'adapters', which workers read from a folder of their node, but "
                    f"placement.rollout.nodes_per_engine is {nodes}: set rollout.lora_sync to 'merged'"
                )
            if self.policy.lora.base == "nf4":
                raise ValueError(
                    "rollout.lora_sync is 'adapters', but policy.lora.base is 'nf4': the engines' base model is not "
                    "quantised, so it is another than the trainer's; set rollout.lora_sync to 'merged'"
                )
        if self.policy_is_reference:
            _check_unused_reference(self.reference, self.placement.reference)
        check_sharing(self.roles, offload_idle=self.placement.offload_idle)
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


def _trained_role(
    kind: RoleKind, name: str, section: RewardModel | Policy, placement: RolePlacement, *, passes: int = 0
) -> RoleSpec:
    """The model that learns from the rows of a data set."""
    return RoleSpec(
        name=name,
        kind=kind,
        section=name,
        model=ModelSource(f"{name}.model", section.model, section.trust_remote_code),
        engine=section.engine,
        placed_as=name,
        placement=placement,
        ranks=placement.ranks or 1,
        needs={
            "score": Level.WEIGHTS,
            "update": Level.FULL,
            "checkpoint": Level.FULL,
            "export": Level.WEIGHTS,
        },
        lora=section.lora,
        trained=True,
        checkpointed=True,
        exported=True,
        score_passes=passes,
    )


def _reference_role(
    reference: Reference,
    policy: ModelSource,
    placement: RolePlacement,
    ranks: int,
    *,
    passes: int,
    updated: bool = False,
) -> RoleSpec:
    """The model that the policy is held close to or compared with, in so many passes over a step; `updated` where it
    follows the policy."""
    own = reference.from_model != "policy"
    return RoleSpec(
        name="reference",
        kind="causal",
        section="reference",
        model=ModelSource("reference.from", reference.from_model, policy.trust_remote_code) if own else policy,
        engine=reference.engine,
        placed_as="reference",
        placement=placement,
        ranks=ranks,
        needs={"score": Level.WEIGHTS, "checkpoint": Level.WEIGHTS},
        checkpointed=updated,
        score_passes=passes,
    )


def _train_and_eval(train: str, held_out: str | None) -> dict[str, str]:
    return {"data.train": train} | ({} if held_out is None else {"data.eval": held_out})


class EpochJob(Job):
    """A job that goes over a data set in epochs."""

    if TYPE_CHECKING:
        run: EpochRun

    @property
    @abstractmethod
    def section(self) -> Policy | RewardModel:
        """The section of the model that learns."""

    @property
    @abstractmethod
    def rows_per_step(self) -> int:
        """Rows of the data set in one optimizer step."""

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
    def rows_per_step(self) -> int:
        """Rows of the data set in one optimizer step."""
        return self.data.rows_per_step

    @property
    def roles(self) -> tuple[RoleSpec, ...]:
        """The reward model alone."""
        return (_trained_role("scalar", "reward", self.reward, self.placement.reward),)

    @property
    def step_shape(self) -> StepShape:
        """Two texts of each row, as most rows have; a score of each."""
        return StepShape(samples=self.rows_per_step, prompt=0, response=self.data.max_tokens, texts=2, last_only=True)

    @property
    def data_files(self) -> dict[str, str]:
        """What it trains on and is evaluated on."""
        return _train_and_eval(self.data.train, self.data.eval)

    @property
    def kind(self) -> ComparisonKind:
        """What its rows are for."""
        return "rewards"

    @model_validator(mode="after")
    def _sections_agree(self) -> "RewardModelJob":
        _check_epochs(self, self.data.eval, {"eval/loss", "eval/accuracy", "eval/margin"})
        return self


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
    def rows_per_step(self) -> int:
        """Rows of the data set in one optimizer step."""
        return self.data.rows_per_step

    @property
    def roles(self) -> tuple[RoleSpec, ...]:
        """The language model alone."""
        return (_trained_role("causal", "policy", self.policy, self.placement.policy),)

    @property
    def step_shape(self) -> StepShape:
        """Conversations."""
        return StepShape(samples=self.rows_per_step, prompt=0, response=self.data.max_tokens)

    @property
    def data_files(self) -> dict[str, str]:
        """What it trains on and is evaluated on."""
        if isinstance(self.data.train, str):
            return _train_and_eval(self.data.train, self.data.eval)
        sources = {f"data.train.{index}.path": source.path for index, source in enumerate(self.data.train)}
        return sources | ({} if self.data.eval is None else {"data.eval": self.data.eval})

    @model_validator(mode="after")
    def _sections_agree(self) -> "SFTJob":
        if self.data.streaming and self.run.steps is None:
            raise ValueError("data.streaming: true needs run.steps, since a stream has no length")
        if self.data.streaming and self.run.epochs != 1:
            raise ValueError(f"run.epochs ({self.run.epochs}) has no effect with data.streaming: set run.steps")
        if self.run.steps is not None and not self.data.streaming:
            raise ValueError(f"run.steps ({self.run.steps}) is for data.streaming: true; set run.epochs")
        _check_epochs(self, self.data.eval, {"eval/loss", "eval/entropy", "eval/perplexity"})
        return self


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
    def rows_per_step(self) -> int:
        """Rows of the data set in one optimizer step."""
        return self.data.rows_per_step

    @property
    def roles(self) -> tuple[RoleSpec, ...]:
        """The policy, and the reference where a loss needs one of its own."""
        # KTO compares with mismatched answers too; where a loss couples the rows of a step, it takes all as given.
        passes = 1 if self.algorithm.kto is None else 2
        own = int(self.algorithm.couples_rows) + passes - 1
        if self.algorithm.needs_reference and self.policy_is_reference and self.reference.cache is None:
            own += passes
        policy = _trained_role("causal", "policy", self.policy, self.placement.policy, passes=own)
        if not self.algorithm.needs_reference or self.policy_is_reference:
            return (policy,)
        assert policy.model is not None
        ranks, updated = self.placement.reference_ranks, self.reference.update_every > 0
        return (
            policy,
            _reference_role(
                self.reference,
                policy.model,
                self.placement.reference,
                ranks,
                passes=0 if self.reference.cache is not None else passes,
                updated=updated,
            ),
        )

    @property
    def data_files(self) -> dict[str, str]:
        """What it trains on and is evaluated on."""
        return _train_and_eval(self.data.train, self.data.eval)

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
        measures = {f"eval/{name}" for name in self.algorithm.measures}
        _check_epochs(self, self.data.eval, measures)
        if not self.algorithm.needs_reference and self.reference != PreferenceReference():
            raise ValueError("reference has no effect: algorithm.loss and algorithm.reference_free compare with none")
        if self.algorithm.needs_reference and self.policy_is_reference:
            _check_unused_reference(self.reference, self.placement.reference)
            if self.reference.update_every:
                raise ValueError(
                    f"reference.update_every is {self.reference.update_every}, but with policy.lora the reference is "
                    "the policy with its adapters off, which stays as it is"
                )
        check_sharing(self.roles, offload_idle=self.placement.offload_idle)
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


def _check_lora(role: RoleSpec, gpus: float) -> None:
    if role.lora is None or role.lora.base == "as_model":
        return
    base, name = f"{role.section}.lora.base is {role.lora.base!r}", role.section
    if role.model_engine is not None and role.model_engine.zero_stage == 3:
        raise ValueError(f"{base}, which ZeRO can't shard, but {name}.engine.zero_stage is 3")
    if not gpus:
        raise ValueError(f"{base}, which needs a GPU, but placement.{role.placed_as}.gpus is 0")


def _check_epochs(job: EpochJob, held_out: str | None, measures: set[str]) -> None:
    """`measures` are the metrics of an evaluation."""
    run = job.run
    assert job.trained.placement is not None
    _check_lora(job.trained, job.trained.placement.gpus)
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


JobConfig = Job

JOB_TYPES: dict[str, type[Job]] = {
    "ppo": PPOJob,
    "preference": PreferenceJob,
    "reward_model": RewardModelJob,
    "sft": SFTJob,
}
