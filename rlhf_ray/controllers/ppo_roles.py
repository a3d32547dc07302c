"""The roles of a policy-gradient job, from its config."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.actors.critic import CriticGroup, CriticWorker
from rlhf_ray.actors.devices import Devices, Movable
from rlhf_ray.actors.group import ActorGroup, Calls, wait_together
from rlhf_ray.actors.policy import PolicyGroup, PolicyWorker
from rlhf_ray.actors.reference import ReferenceGroup, ReferenceWorker
from rlhf_ray.actors.reward import RewardModelGroup, RewardModelWorker, ScorePart, TextRewardGroup, TextRewardWorker
from rlhf_ray.actors.rollout import RolloutGroup
from rlhf_ray.actors.shards import GeneratedShard
from rlhf_ray.actors.worker import RankGroup, join_collectives_of
from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.rewards import ModelReward, part_name
from rlhf_ray.controllers.inputs import PPOInputs
from rlhf_ray.controllers.roles import Actors, load_models
from rlhf_ray.data.columns import ColumnPart
from rlhf_ray.engines.rollout_setup import RolloutSetup


@dataclass(frozen=True)
class RewardPart:
    """One part of the reward and who computes it.

    Attributes:
        name: in metrics.
        weight: in the sum.
        group: its actors.
    """

    name: str
    weight: float
    group: RewardModelGroup | TextRewardGroup

    def score(self, shard: GeneratedShard) -> Calls[ScorePart]:
        """Start scoring a shard."""
        return self.group.score(shard)


@dataclass(frozen=True)
class PPORoles:
    """The roles. `critic` is None where the algorithm needs none, `reference` where the policy with its adapters off is
    the reference."""

    policy: PolicyGroup
    critic: CriticGroup | None
    reference: ReferenceGroup | None
    rewards: tuple[RewardPart, ...]
    rollout: RolloutGroup
    devices: Devices

    @property
    def groups(self) -> list[ActorGroup[Any]]:
        """All of them."""
        return [*self.models, self.rollout, *(part.group for part in self.rewards)]

    @property
    def models(self) -> list[RankGroup[Any]]:
        """Policy, critic and reference."""
        return [group for group in (self.policy, self.critic, self.reference) if group is not None]

    @property
    def reward_models(self) -> list[RewardModelGroup]:
        """The parts of the reward that are models."""
        return [part.group for part in self.rewards if isinstance(part.group, RewardModelGroup)]

    def reference_logprobs(self, shard: GeneratedShard) -> Calls[ColumnPart]:
        """Start to compute the reference's log-probs of a shard."""
        return self.policy.reference_logprobs(shard) if self.reference is None else self.reference.logprobs(shard)


def start_ppo_roles(config: PPOJob, inputs: PPOInputs, actors: Actors) -> PPORoles:
    """Start all actors of the job with their models, connected for weight transfer."""
    policy = actors.ranks(config.role("policy"), PolicyWorker, PolicyGroup, config)
    critic = reference = None
    if config.critic is not None:
        critic = actors.ranks(config.role("critic"), CriticWorker, CriticGroup, config)
    if not config.policy_is_reference:
        reference = actors.ranks(config.role("reference"), ReferenceWorker, ReferenceGroup, config)
    rewards = tuple(_reward_part(config, index, actors) for index in range(len(config.reward)))
    rollout = actors.engines(
        config.placement.rollout, config.rollout, config.run.timeouts, deterministic=config.run.deterministic
    )
    movable: dict[str, Sequence[Movable]] = {
        "policy": [policy],
        "critic": [] if critic is None else [critic],
        "reference": [] if reference is None else [reference],
        "reward": [part.group for part in rewards if isinstance(part.group, RewardModelGroup)],
        "rollout": [rollout],
    }
    roles = PPORoles(policy, critic, reference, rewards, rollout, Devices(config, movable))
    _load_ppo_models(config, inputs, roles)
    return roles


def _reward_part(config: PPOJob, index: int, actors: Actors) -> RewardPart:
    part = config.reward[index]
    role = config.role(f"reward-{part_name(part)}")
    group: RewardModelGroup | TextRewardGroup
    if isinstance(part, ModelReward):
        group = actors.ranks(role, RewardModelWorker, RewardModelGroup, config)
    else:
        group = actors.unplaced(role, TextRewardWorker, TextRewardGroup)
    return RewardPart(part_name(part), part.weight, group)


def _load_ppo_models(config: PPOJob, inputs: PPOInputs, roles: PPORoles) -> None:
    timeouts, loads = config.run.timeouts, _ppo_loads(config, inputs, roles)
    # Engines take longest, and count what is free on their devices, where others must not load meanwhile.
    starting = list(loads.pop("rollout")())
    if config.placement.rollout.colocate is not None:
        wait_together(starting, timeouts.setup, "rollout: load_model")
    join_collectives_of([*roles.models, *roles.reward_models], timeouts)
    load_models({"rollout": lambda: starting} | loads, roles.devices, timeouts)
    roles.policy.connect(
        roles.rollout.actors,
        config.placement.rollout.tensor_parallel,
        config.rollout.sync_bucket_bytes(on_gpu=config.placement.gpus_of("rollout") > 0),
        timeouts,
        same_devices=config.placement.rollout.colocate == "policy",
    ).wait(timeouts.setup)


def _ppo_loads(config: PPOJob, inputs: PPOInputs, roles: PPORoles) -> dict[str, Callable[[], Sequence[Calls[None]]]]:
    """What starts the loading of each role's models."""
    trust = config.policy.trust_remote_code
    temperature = config.rollout.sampling.temperature
    updates = config.algorithm.epochs * config.algorithm.optimizer_steps
    policy_steps = (config.run.steps - config.algorithm.critic_warmup_steps) * updates
    setup = RolloutSetup(
        config.policy.model,
        config.rollout.engine,
        config.rollout.engine.dtype,
        config.placement.rollout.tensor_parallel,
        config.seed,
        trust_remote_code=trust,
        adapter_rank=config.policy.lora.rank if config.policy.lora and config.sends_adapters else None,
        beside_policy=config.placement.rollout.colocate == "policy",
        sleep=2 if roles.devices.loses_weights("rollout") else 1 if roles.devices.shares("rollout") else 0,
    )

    def rewards() -> list[Calls[None]]:
        same_tokens = iter(inputs.same_tokens)
        columns = [column.name for column in inputs.prompts.columns]
        calls = []
        for part, section in zip(roles.rewards, config.reward, strict=True):
            if isinstance(part.group, RewardModelGroup):
                assert isinstance(section, ModelReward)
                calls.append(part.group.load_model(section, part.name, config.policy.model, trust, next(same_tokens)))
            else:
                assert not isinstance(section, ModelReward)
                calls.append(part.group.load_model(section, config.policy.model, trust, columns))
        return calls

    loads: dict[str, Callable[[], Sequence[Calls[None]]]] = {
        "rollout": lambda: [roles.rollout.load_model(setup)],
        "policy": lambda: [
            roles.policy.load_model(
                config.policy, config.algorithm, temperature, policy_steps, config.rollout.lora_sync
            )
        ],
    }
    if (critic := roles.critic) is not None and (section := config.critic) is not None:
        model = config.role("critic").model
        assert model is not None
        steps = config.run.steps * updates
        loads["critic"] = lambda: [critic.load_model(section, model.path, config.algorithm, steps, config.seed)]
    loads["reward"] = rewards
    if (reference := roles.reference) is not None:
        source = config.role("reference").model
        assert source is not None
        loads["reference"] = lambda: [
            reference.load_model(source.path, config.reference.engine, temperature, trust, tokens_only=True)
        ]
    return loads
