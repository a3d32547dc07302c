"""`job: ppo`."""

from dataclasses import replace
from typing import Any, Literal

from pydantic import model_validator

from rlhf_ray.config.algorithm import PPO
from rlhf_ray.config.base import MOST_ROWS
from rlhf_ray.config.data import PromptData
from rlhf_ray.config.job import Job
from rlhf_ray.config.job_roles import check_lora, check_unused_reference, own_model, reference_role, trained_role
from rlhf_ray.config.placement import PPOPlacement, RolePlacement
from rlhf_ray.config.plugs import ESTIMATORS, Estimator, choose
from rlhf_ray.config.rewards import FunctionReward, ModelReward, RewardPart, part_name
from rlhf_ray.config.roles import Level, ModelSource, PhaseSpec, RoleSpec, StepShape
from rlhf_ray.config.rollout import Rollout, shard_count
from rlhf_ray.config.run import PPORun
from rlhf_ray.config.sharing import check_sharing
from rlhf_ray.config.training import Critic, Policy, Reference

MAX_ENGINE_RANK = 512
"""Largest rank of an adapter that vLLM applies."""


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
        """The model that a critic starts from."""
        trusted = critic.trust_remote_code
        if critic.init_from != "reward":
            return ModelSource("critic.init_from", critic.init_from, trusted)
        first = self.reward_models[0]
        return ModelSource(f"reward.{self.reward.index(first)}.model", first.model, trusted)

    @property
    def roles(self) -> tuple[RoleSpec, ...]:
        """Policy, critic, reference, the parts of the reward, and the engines."""
        model, at = own_model("policy", self.policy), self.placement
        bucket = self.rollout.sync_bucket_bytes(on_gpu=at.gpus_of("rollout") > 0)
        passes = 2 if self.policy_is_reference else 1
        policy = trained_role("causal", "policy", self.policy, model, at.policy, at.ranks_of("policy"), passes=passes)
        found = [
            replace(
                policy,
                needs={**policy.needs, "sync": Level.WEIGHTS},
                entropy=self.algorithm.entropy_coef > 0,
                sync_bytes=bucket,
                modules=self._policy_modules,
            )
        ]
        if self.critic is not None:
            source, ranks = self._critic_source(self.critic), at.ranks_of("critic")
            critic = trained_role("scalar", "critic", self.critic, source, at.critic, ranks, passes=1, exported=False)
            found.append(critic)
        if not self.policy_is_reference:
            found.append(reference_role(self.reference, model, at.reference, at.ranks_of("reference"), passes=1))
        found += [self._reward_role(index, part) for index, part in enumerate(self.reward)]
        rollout = RoleSpec(
            name="rollout",
            kind="engine",
            section="rollout",
            model=model,
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
        """Those of a loss and of an estimator of one's own."""
        plugs = {"policy_loss": self.algorithm.policy_loss, "advantage": self.algorithm.advantage}
        parts = {key: plug.partition(":") for key, plug in plugs.items()}
        return {f"algorithm.{key}": module for key, (module, own, _) in parts.items() if own}

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
            PhaseSpec("checkpoint", after=("update",)),
            PhaseSpec("sync", after=("checkpoint",)),  # engines that share devices leave them for a checkpoint
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

    @model_validator(mode="after")
    def _sections_agree(self) -> "PPOJob":
        self._check_samples()
        self._check_reward()
        self._check_critic()
        self._check_ranks()
        self._check_adapters()
        check_sharing(self)
        return self

    def _check_samples(self) -> None:
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

    def _check_reward(self) -> None:
        names = [part_name(part) for part in self.reward]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"reward.{index} and reward.{names.index(name)} are both named {name!r}: set name")
            if name in ("mean", "std"):
                raise ValueError(f"reward.{index}.name: {name!r} is the name of a metric of the sum; choose another")
        if not any(part.weight for part in self.reward):
            raise ValueError("every reward.N.weight is 0: there is nothing to learn")

    def _check_critic(self) -> None:
        estimator, name = self.algorithm.estimator, f"algorithm.advantage: {self.algorithm.advantage}"
        if estimator.groups and self.data.samples_per_prompt < 2:
            raise ValueError(
                f"data.samples_per_prompt is {self.data.samples_per_prompt}, but {name} compares the samples of a "
                "prompt: set it to 2 or more"
            )
        if not estimator.values:
            own = {"critic": self.critic is not None, "placement.critic": self.placement.critic != RolePlacement()}
            for key in (key for key, is_set in own.items() if is_set):
                raise ValueError(f"{key} has no effect with {name}, which needs no critic: leave it out")
            for role in ("policy", "reference", "reward", "rollout"):
                if self.placement.section(role).colocate == "critic":
                    raise ValueError(f"placement.{role}.colocate is 'critic', but with {name} there is none")
        elif self.critic is not None and self.critic.init_from == "reward" and not self.reward_models:
            raise ValueError(
                "critic.init_from is 'reward', but reward has no part with a model: name a model folder in "
                "critic.init_from"
            )

    def _check_ranks(self) -> None:
        """Each data-parallel rank needs a sample of what it works on."""
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
        a_shard = self.samples_per_step // shard_count(self.samples_per_step, self.rollout.shard_samples)
        for role in models:
            if role.model_engine is not None and role.model_engine.zero_stage == 3 and a_shard < role.dp_size:
                raise ValueError(
                    f"rollout.shard_samples ({self.rollout.shard_samples}) cuts {self.samples_per_step} samples into "
                    f"shards of {a_shard}, fewer than {role.dp_size_text}, which all work on each shard because "
                    f"{role.section}.engine.zero_stage is 3"
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

    def _check_adapters(self) -> None:
        for role in self.roles:
            check_lora(role, self.placement)
        if self.policy_is_reference:
            check_unused_reference(self.reference, self.placement.reference)
        if self.rollout.lora_sync != "adapters":
            return
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
