"""The five roles of a PPO job, from its config."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from rlhf_ray.actors.critic import CriticWorker
from rlhf_ray.actors.devices import Devices
from rlhf_ray.actors.group import ActorGroup, Seating, create_group
from rlhf_ray.actors.liveness import liveness
from rlhf_ray.actors.policy import PolicyWorker
from rlhf_ray.actors.reference import ReferenceWorker
from rlhf_ray.actors.reward import RewardModelWorker, TextRewardWorker
from rlhf_ray.actors.rollout import GeneratedShard, RolloutGroup, RolloutWorker
from rlhf_ray.actors.waiting import ActorFailure, wait_all
from rlhf_ray.actors.watched import actor_class
from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.rewards import FunctionReward, ModelReward, part_name
from rlhf_ray.controllers.inputs import PPOInputs
from rlhf_ray.controllers.roles import Engine, Watch, arguments_of, identity, join_collectives, unwatched
from rlhf_ray.engines.rollout_setup import RolloutSetup

logger = logging.getLogger("rlhf_ray")


@dataclass(frozen=True)
class RewardPart:
    """One part of the reward and who computes it.

    Attributes:
        name: in metrics.
        weight: in the sum.
        group: its actors.
        is_model: held by ranks, which may share a shard; else each worker scores whole shards.
    """

    name: str
    weight: float
    group: ActorGroup
    is_model: bool

    def score(self, shard: GeneratedShard) -> list[ray.ObjectRef]:
        """Start scoring a shard."""
        if self.is_model:
            return self.group.call_on("score", shard)
        return [self.group.call_one(shard.number, "score", shard.trajectories)]


@dataclass(frozen=True)
class PPORoles:
    """The five roles; `reference` is None where the policy with its adapters off is the reference."""

    policy: ActorGroup
    critic: ActorGroup
    reference: ActorGroup | None
    rewards: tuple[RewardPart, ...]
    rollout: RolloutGroup
    devices: Devices

    @property
    def groups(self) -> list[ActorGroup]:
        """All of them."""
        return [*self.models, self.rollout, *(part.group for part in self.rewards)]

    @property
    def models(self) -> list[ActorGroup]:
        """Policy, critic and reference."""
        return [self.policy, self.critic] if self.reference is None else [self.policy, self.critic, self.reference]

    def reference_logprobs(self, shard: GeneratedShard) -> list[ray.ObjectRef]:
        """Start to compute the reference's log-probs of a shard."""
        if self.reference is None:
            return self.policy.call_on("reference_logprobs", shard)
        return self.reference.call_on("logprobs", shard)


@contextmanager
def ppo_roles(config: PPOJob, inputs: PPOInputs, watch: Watch = unwatched) -> Iterator[PPORoles]:
    """Start all actors of a PPO job with their models, connected for weight transfer; end them on the way out. `watch`
    as in `epoch_role`."""
    placement = config.placement
    logger.info("starting the actors and loading the models")
    seating = Seating(config.places, placement.placement_timeout_s, autoscaling=config.cluster.autoscaling)
    started: list[ActorGroup] = []
    try:

        def group(role: str, worker: type, engine: Engine, name: str | None = None) -> ActorGroup:
            count, name = placement.ranks_of(role), name or role  # type: ignore[arg-type]
            identities = identity(name, count, config)
            created = create_group(
                name,
                worker,
                seating.seats[role],
                count,
                identities,
                engine.sequence_parallel,
                sharded=engine.zero_stage == 3,
            )
            started.append(created)
            return created

        policy = group("policy", PolicyWorker, config.policy.engine)
        critic = group("critic", CriticWorker, config.critic.engine)
        reference = None
        if not config.policy_is_reference:
            reference = group("reference", ReferenceWorker, config.reference.engine)
        rewards = tuple(_reward_part(part, group) for part in config.reward)
        started += [part.group for part in rewards if not part.is_model]
        engines = create_group(
            "rollout",
            RolloutWorker,
            seating.seats["rollout"],
            placement.rollout.engines * placement.rollout.parts,
            lambda number: {"rank": number // placement.rollout.parts},
        )
        rollout = RolloutGroup(
            engines.actors,
            config.rollout,
            deterministic=config.run.deterministic,
            timeout_s=config.run.timeouts.rollout_s,
            parts=placement.rollout.parts,
        )
        started.append(rollout)
        movable: dict[str, list[ActorGroup]] = {
            "policy": [policy],
            "critic": [critic],
            "reference": [] if reference is None else [reference],
            "reward": [part.group for part in rewards if part.is_model],
            "rollout": [rollout],
        }
        devices = Devices(config.places, movable, config.run.timeouts, offload_idle=placement.offload_idle)
        roles = PPORoles(policy, critic, reference, rewards, rollout, devices)
        for created in roles.groups:
            watch(created)
        _load_ppo_models(config, inputs, roles)
        yield roles
    except ActorFailure as error:  # told now: engines that are still starting may take half a minute to end
        logger.error("%s", str(error).partition("\n")[0])
        raise
    finally:
        for created in started:
            if isinstance(created, RolloutGroup):
                _end_engines(created)
            created.kill()
        seating.release()


def _end_engines(rollout: RolloutGroup) -> None:
    for error in rollout.end_engines(timeout_s=30):
        logger.warning("a rollout engine did not end in order: %s", error)


def _reward_part(part: Any, group: Any) -> RewardPart:
    name = part_name(part)
    if isinstance(part, ModelReward):
        ranks = group("reward", RewardModelWorker, part.engine, f"reward-{name}")
        return RewardPart(name, part.weight, ranks, is_model=True)
    workers = part.workers if isinstance(part, FunctionReward) else 1
    worker = actor_class(TextRewardWorker).options(num_cpus=0)
    actors = [worker.remote(**arguments_of(f"reward-{name}", rank, workers, 0, False)) for rank in range(workers)]
    liveness.watch(f"reward-{name}", actors)
    return RewardPart(name, part.weight, ActorGroup(f"reward-{name}", actors), is_model=False)


def _load_ppo_models(config: PPOJob, inputs: PPOInputs, roles: PPORoles) -> None:
    """Load all models: at once, but for roles that share devices, which load and leave one after the other."""
    timeouts, devices = config.run.timeouts, roles.devices
    loads = _ppo_loads(config, inputs, roles)
    loading: list[ray.ObjectRef] = []

    def start(role: str) -> None:
        started = loads[role]()
        if devices.shares(role):
            wait_all(started, timeouts.setup_s, f"{role}: load_model", "run.timeouts.setup_s")
            devices.loaded(role)
        else:
            loading.extend(started)

    # Engines take longest, and count what is free on their devices.
    start("rollout")
    join_collectives([*roles.models, *(p.group for p in roles.rewards if p.is_model)], timeouts)
    for role in loads:
        if role != "rollout":
            start(role)
    wait_all(loading, timeouts.setup_s, "loading of the models", "run.timeouts.setup_s")
    [(host, port)] = wait_all(
        [roles.policy.call_one(0, "address")], timeouts.setup_s, "policy: address", "run.timeouts.setup_s"
    )
    connected = roles.policy.call(
        "connect",
        roles.rollout.actors,
        config.placement.rollout.tensor_parallel,
        host,
        port,
        config.rollout.sync_bucket_mib * 2**20,
        timeouts.sync_s,
        config.placement.rollout.colocate == "policy",
    )
    wait_all(connected, timeouts.setup_s, "policy and engines connecting", "run.timeouts.setup_s")


def _ppo_loads(config: PPOJob, inputs: PPOInputs, roles: PPORoles) -> dict[str, Callable[[], list[ray.ObjectRef]]]:
    """What starts the loading of each role's models."""
    trust = config.policy.trust_remote_code
    temperature = config.rollout.sampling.temperature
    updates = config.algorithm.epochs * config.algorithm.optimizer_steps
    policy_steps = (config.run.steps - config.algorithm.critic_warmup_steps) * updates
    adapters = config.policy.lora is not None and config.rollout.lora_sync == "adapters"
    setup = RolloutSetup(
        config.policy.model,
        config.rollout.engine,
        config.rollout.engine.dtype or config.policy.engine.dtype,
        config.placement.rollout.tensor_parallel,
        config.seed,
        trust_remote_code=trust,
        adapter_rank=config.policy.lora.rank if config.policy.lora and adapters else None,
        beside_policy=config.placement.rollout.colocate == "policy",
        sleep=(1 if adapters else 2) if roles.devices.shares("rollout") else 0,
    )

    def rewards() -> list[ray.ObjectRef]:
        same_tokens = iter(inputs.same_tokens)
        refs: list[ray.ObjectRef] = []
        for part, reward in zip(roles.rewards, config.reward, strict=True):
            model = (
                (part.name, config.policy.model, trust, next(same_tokens)) if isinstance(reward, ModelReward) else ()
            )
            refs += part.group.call("load_model", reward, *(model or (config.policy.model, trust)))
        return refs

    loads = {
        "rollout": lambda: roles.rollout.start_engines(setup, config.run.timeouts.setup_s),
        "policy": lambda: roles.policy.call(
            "load_model", config.policy, config.algorithm, temperature, policy_steps, config.rollout.lora_sync
        ),
        "critic": lambda: roles.critic.call(
            "load_model", config.critic, inputs.critic_model, config.algorithm, config.run.steps * updates, config.seed
        ),
        "reward": rewards,
    }
    if (reference := roles.reference) is not None:
        loads["reference"] = lambda: reference.call(
            "load_model", inputs.reference_model, config.reference.engine, temperature, trust
        )
    return loads
