"""The actors of a job, from its config."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlhf_ray.actors.devices import Devices
from rlhf_ray.actors.group import ActorGroup, Seating, create_group
from rlhf_ray.actors.preference import PreferenceWorker
from rlhf_ray.actors.reference import ReferenceWorker
from rlhf_ray.actors.reward_training import RewardTrainingWorker
from rlhf_ray.actors.sft import SFTWorker
from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.config.jobs import JobConfig, PreferenceJob, RewardModelJob, SFTJob
from rlhf_ray.config.run import Timeouts
from rlhf_ray.config.training import ScoringEngine, TrainingEngine

logger = logging.getLogger("rlhf_ray")

Engine = TrainingEngine | ScoringEngine
Watch = Callable[[ActorGroup], None]


def unwatched(group: ActorGroup) -> None:
    """For `watch`, where nobody looks."""


@contextmanager
def epoch_role(config: RewardModelJob | SFTJob, total_steps: int, watch: Watch = unwatched) -> Iterator[ActorGroup]:
    """Start the ranks of a job over a data set; end them on the way out.

    Args:
        watch: gets each group as soon as its actors are started, before they load anything.
    """
    logger.info("starting the actors and loading the model")
    role = config.role
    seating = Seating(config.places, config.placement.placement_timeout_s, autoscaling=config.cluster.autoscaling)
    worker, arguments = (
        (RewardTrainingWorker, (config.reward, config.loss, total_steps, config.seed))
        if isinstance(config, RewardModelJob)
        else (SFTWorker, (config.policy, total_steps))
    )
    group = None
    try:
        identities = identity(role.name, role.ranks, config)
        together = role.trained.engine.sequence_parallel
        group = create_group(role.name, worker, seating.seats[role.name], role.ranks, identities, together)
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
    devices: Devices


@contextmanager
def preference_roles(
    config: PreferenceJob, total_steps: int, watch: Watch = unwatched, *, with_reference: bool
) -> Iterator[PreferenceRoles]:
    """Start the ranks of a preference job; end them on the way out. `watch` as in `epoch_role`."""
    logger.info("starting the actors and loading the models")
    placement, timeouts = config.placement, config.run.timeouts
    places = {role: placed for role, placed in config.places.items() if role == "policy" or with_reference}
    seating = Seating(places, placement.placement_timeout_s, autoscaling=config.cluster.autoscaling)
    started: list[ActorGroup] = []

    def group(role: str, worker: type, ranks: int, engine: Engine) -> ActorGroup:
        identities = identity(role, ranks, config)
        started.append(create_group(role, worker, seating.seats[role], ranks, identities, engine.sequence_parallel))
        watch(started[-1])
        return started[-1]

    try:
        policy, reference = group("policy", PreferenceWorker, config.role.ranks, config.policy.engine), None
        if with_reference:
            reference = group("reference", ReferenceWorker, placement.reference_ranks, config.reference.engine)
        movable = {"policy": [policy], "reference": [] if reference is None else [reference]}
        devices = Devices(places, movable, timeouts, offload_idle=placement.offload_idle)
        join_collectives(started, timeouts)
        loading = policy.call("load_model", config.policy, config.algorithm, total_steps)
        if devices.shares("policy"):
            wait_all(loading, timeouts.setup_s, "policy: load_model", "run.timeouts.setup_s")
            devices.loaded("policy")
        if reference is not None:
            trusted = config.policy.trust_remote_code
            loading += reference.call("load_model", config.reference_model, config.reference.engine, 1.0, trusted)
        wait_all(loading, timeouts.setup_s, "loading of the models", "run.timeouts.setup_s")
        devices.loaded("reference")
        yield PreferenceRoles(policy, reference, devices)
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


def identity(role: str, ranks: int, config: JobConfig) -> Callable[[int], dict[str, Any]]:
    """Constructor arguments of each rank of a role."""
    return lambda rank: arguments_of(role, rank, ranks, config.seed, config.run.deterministic)


def arguments_of(role: str, rank: int, ranks: int, seed: int, deterministic: bool) -> dict[str, Any]:
    """Constructor arguments of one worker."""
    return {"role": role, "rank": rank, "world_size": ranks, "seed": seed, "deterministic": deterministic}
