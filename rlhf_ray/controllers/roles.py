"""The actors of a job, from its config."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from rlhf_ray.actors.critic import CriticWorker
from rlhf_ray.actors.group import ActorGroup, Seat, Seating, create_group
from rlhf_ray.actors.policy import PolicyWorker
from rlhf_ray.actors.preference import PreferenceWorker
from rlhf_ray.actors.reference import ReferenceWorker
from rlhf_ray.actors.reward import RewardModelWorker, TextRewardWorker
from rlhf_ray.actors.reward_training import RewardTrainingWorker
from rlhf_ray.actors.rollout import RolloutGroup, RolloutWorker
from rlhf_ray.actors.sft import SFTWorker
from rlhf_ray.actors.waiting import RoleFailure, RoleTimeout, wait_all
from rlhf_ray.actors.watched import actor_class
from rlhf_ray.config.jobs import JobConfig, PPOJob, PreferenceJob, RewardModelJob, SFTJob
from rlhf_ray.config.rewards import FunctionReward, ModelReward, part_name
from rlhf_ray.config.run import Timeouts
from rlhf_ray.controllers.preflight import PPOInputs

logger = logging.getLogger("rlhf_ray")


@dataclass(frozen=True)
class RewardPart:
    """One part of the reward and who computes it.

    Attributes:
        name: in metrics.
        weight: in the sum.
        group: its actors.
        collective: all ranks score a shard together; else each worker scores whole shards.
    """

    name: str
    weight: float
    group: ActorGroup
    collective: bool

    def score(self, shard: int, trajectories: ray.ObjectRef) -> list[ray.ObjectRef]:
        """Start scoring a shard."""
        if self.collective:
            return self.group.call("score", trajectories)
        return [self.group.call_one(shard, "score", trajectories)]


@dataclass(frozen=True)
class PPORoles:
    """The five roles; `reference` is None where the policy with its adapters off is the reference."""

    policy: ActorGroup
    critic: ActorGroup
    reference: ActorGroup | None
    rewards: tuple[RewardPart, ...]
    rollout: RolloutGroup

    @property
    def groups(self) -> list[ActorGroup]:
        """All of them."""
        return [*self.models, self.rollout, *(part.group for part in self.rewards)]

    @property
    def models(self) -> list[ActorGroup]:
        """Policy, critic and reference."""
        return [self.policy, self.critic] if self.reference is None else [self.policy, self.critic, self.reference]

    def reference_logprobs(self, trajectories: ray.ObjectRef) -> list[ray.ObjectRef]:
        """Start to compute the reference's log-probs of a shard."""
        if self.reference is None:
            return self.policy.call("reference_logprobs", trajectories)
        return self.reference.call("logprobs", trajectories)


Watch = Callable[[ActorGroup], None]


def _unwatched(group: ActorGroup) -> None:
    """Where nobody wants to know of groups as they start."""


@contextmanager
def ppo_roles(config: PPOJob, inputs: PPOInputs, watch: Watch = _unwatched) -> Iterator[PPORoles]:
    """Start all actors of a PPO job with their models, connected for weight transfer; end them on the way out.

    Args:
        watch: gets each group as soon as its actors are started, before they load anything.
    """
    placement = config.placement
    logger.info("starting the actors and loading the models")
    seating = Seating(placement.placement_timeout_s)
    started: list[ActorGroup] = []
    try:
        seats = _ppo_seats(config, seating)

        def group(role: str, worker: type, name: str | None = None, ranks: int | None = None) -> ActorGroup:
            count = ranks or placement.ranks_of(role)  # type: ignore[arg-type]
            created = create_group(name or role, worker, seats[role], count, _identity(name or role, count, config))
            started.append(created)
            return created

        policy, critic = group("policy", PolicyWorker), group("critic", CriticWorker)
        reference = None if config.policy_is_reference else group("reference", ReferenceWorker)
        rewards = tuple(_reward_part(part, group) for part in config.reward)
        started += [part.group for part in rewards if not part.collective]
        engines = create_group(
            "rollout", RolloutWorker, seats["rollout"], placement.rollout.engines, lambda rank: {"rank": rank}
        )
        rollout = RolloutGroup(
            engines.actors,
            config.rollout,
            deterministic=config.run.deterministic,
            timeout_s=config.run.timeouts.rollout_s,
        )
        started.append(rollout)
        roles = PPORoles(policy, critic, reference, rewards, rollout)
        for created in roles.groups:
            watch(created)
        _load_ppo_models(config, inputs, roles)
        yield roles
    finally:
        for created in started:
            if isinstance(created, RolloutGroup):
                _end_engines(created)
            created.kill()
        seating.release()


def _end_engines(rollout: RolloutGroup) -> None:
    """Let the engines end their own processes, which outlive an actor that is killed."""
    try:
        rollout.run("shutdown", timeout_s=30, setting="run.timeouts.setup_s")
    except (RoleFailure, RoleTimeout) as error:
        logger.warning("a rollout engine did not end in order: %s", error)


@contextmanager
def epoch_role(config: RewardModelJob | SFTJob, total_steps: int, watch: Watch = _unwatched) -> Iterator[ActorGroup]:
    """Start the ranks of a job over a data set; end them on the way out. `watch` as in `ppo_roles`."""
    logger.info("starting the actors and loading the model")
    seating = Seating(config.placement.placement_timeout_s)
    role = config.role
    worker, arguments = (
        (RewardTrainingWorker, (config.reward, config.loss, total_steps, config.seed))
        if isinstance(config, RewardModelJob)
        else (SFTWorker, (config.policy, total_steps))
    )
    group = None
    try:
        seat = seating.seat_trained(role.name, role.placement, guests=0)
        group = create_group(role.name, worker, seat, role.ranks, _identity(role.name, role.ranks, config))
        watch(group)
        join_collectives([group], config.run.timeouts)
        loaded = group.call("load_model", *arguments)
        wait_all(loaded, config.run.timeouts.setup_s, f"{role.name}: load_model", "run.timeouts.setup_s")
        yield group
    finally:
        if group is not None:
            group.kill()
        seating.release()


@dataclass(frozen=True)
class PreferenceRoles:
    """Policy and reference; None where no reference model is needed."""

    policy: ActorGroup
    reference: ActorGroup | None


@contextmanager
def preference_roles(
    config: PreferenceJob, total_steps: int, watch: Watch = _unwatched, *, with_reference: bool
) -> Iterator[PreferenceRoles]:
    """Start the ranks of a preference job; end them on the way out. `watch` as in `ppo_roles`."""
    logger.info("starting the actors and loading the models")
    placement, timeouts = config.placement, config.run.timeouts
    seating = Seating(placement.placement_timeout_s)
    started: list[ActorGroup] = []

    def group(role: str, worker: type, seat: Seat, ranks: int) -> ActorGroup:
        started.append(create_group(role, worker, seat, ranks, _identity(role, ranks, config)))
        watch(started[-1])
        return started[-1]

    try:
        beside = with_reference and placement.reference.colocate is not None
        seat = seating.seat_trained("policy", placement.policy, guests=int(beside))
        policy, reference = group("policy", PreferenceWorker, seat, config.role.ranks), None
        if with_reference:
            own = seating.seat_guest if beside else partial(seating.seat_trained, guests=0)
            seat = own("reference", placement.reference)
            reference = group("reference", ReferenceWorker, seat, placement.reference_ranks)
        join_collectives(started, timeouts)
        loading = policy.call("load_model", config.policy, config.algorithm, total_steps)
        if reference is not None:
            trusted = config.policy.trust_remote_code
            loading += reference.call("load_model", config.reference_model, config.reference.engine, 1.0, trusted)
        wait_all(loading, timeouts.setup_s, "loading of the models", "run.timeouts.setup_s")
        yield PreferenceRoles(policy, reference)
    finally:
        for created in started:
            created.kill()
        seating.release()


def join_collectives(groups: Sequence[ActorGroup], timeouts: Timeouts) -> None:
    """Have the ranks of each group meet at its rank 0."""
    first = [group.call_one(0, "address") for group in groups]
    addresses = wait_all(first, timeouts.setup_s, "start of the actors", "run.timeouts.setup_s")
    # A collective must outlast the slowest rank's longest phase; the controller's own limits end a run sooner.
    longest = max(timeouts.setup_s, timeouts.update_s, timeouts.score_s, timeouts.checkpoint_s)
    joined = [
        ref
        for group, (host, port) in zip(groups, addresses, strict=True)
        for ref in group.call("join", host, port, longest)
    ]
    wait_all(joined, timeouts.setup_s, "ranks joining their groups", "run.timeouts.setup_s")


def _ppo_seats(config: PPOJob, seating: Seating) -> dict[str, Seat]:
    placement = config.placement
    models = len(config.reward_models)
    weight = {"policy": 1, "critic": 1, "reference": 0 if config.policy_is_reference else 1, "reward": models}
    seats: dict[str, Seat] = {}
    for role in ("policy", "critic", "reference", "reward"):
        own = getattr(placement, role)
        if own.colocate is None and weight[role]:
            guests = sum(count for guest, count in weight.items() if getattr(placement, guest).colocate == role)
            # Several reward models share their bundles among themselves too.
            seats[role] = seating.seat_trained(role, own, guests + weight[role] - 1)
    for role in ("policy", "critic", "reference", "reward"):
        own = getattr(placement, role)
        if own.colocate is not None and weight[role]:
            seats[role] = seating.seat_guest(role, own)
    seats["rollout"] = seating.seat_engines(placement.rollout)
    return seats


def _reward_part(part: Any, group: Any) -> RewardPart:
    name = part_name(part)
    if isinstance(part, ModelReward):
        return RewardPart(name, part.weight, group("reward", RewardModelWorker, f"reward-{name}"), collective=True)
    workers = part.workers if isinstance(part, FunctionReward) else 1
    worker = actor_class(TextRewardWorker).options(num_cpus=0)
    actors = [worker.remote(**_arguments(f"reward-{name}", rank, workers, 0, False)) for rank in range(workers)]
    return RewardPart(name, part.weight, ActorGroup(f"reward-{name}", actors), collective=False)


def _identity(role: str, ranks: int, config: JobConfig) -> Any:
    return lambda rank: _arguments(role, rank, ranks, config.seed, config.run.deterministic)


def _arguments(role: str, rank: int, ranks: int, seed: int, deterministic: bool) -> Mapping[str, Any]:
    return {"role": role, "rank": rank, "world_size": ranks, "seed": seed, "deterministic": deterministic}


def _load_ppo_models(config: PPOJob, inputs: PPOInputs, roles: PPORoles) -> None:
    timeouts = config.run.timeouts
    trust = config.policy.trust_remote_code
    rollout_dtype = config.rollout.engine.dtype or config.policy.engine.dtype
    temperature = config.rollout.sampling.temperature
    updates = config.algorithm.epochs * config.algorithm.optimizer_steps
    engines = roles.rollout.call(
        "load_model",
        config.policy.model,
        config.rollout,
        rollout_dtype,
        config.placement.rollout.tensor_parallel,
        config.seed,
        trust,
        config.policy.lora.rank if config.policy.lora and config.rollout.lora_sync == "adapters" else None,
    )
    join_collectives([*roles.models, *(p.group for p in roles.rewards if p.collective)], timeouts)
    policy_steps = (config.run.steps - config.algorithm.critic_warmup_steps) * updates
    loading = [
        *engines,
        *roles.policy.call(
            "load_model", config.policy, config.algorithm, temperature, policy_steps, config.rollout.lora_sync
        ),
        *roles.critic.call(
            "load_model", config.critic, inputs.critic_model, config.algorithm, config.run.steps * updates, config.seed
        ),
    ]
    if roles.reference is not None:
        loading += roles.reference.call(
            "load_model", inputs.reference_model, config.reference.engine, temperature, trust
        )
    same_tokens = iter(inputs.same_tokens)
    for part, reward in zip(roles.rewards, config.reward, strict=True):
        if isinstance(reward, ModelReward):
            loading += part.group.call("load_model", reward, part.name, config.policy.model, trust, next(same_tokens))
        else:
            loading += part.group.call("load_model", reward, config.policy.model, trust)
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
    )
    wait_all(connected, timeouts.setup_s, "policy and engines connecting", "run.timeouts.setup_s")
