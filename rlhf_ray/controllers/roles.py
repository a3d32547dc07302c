"""Starting the actors of a job and ending them, whichever job it is."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from rlhf_ray.actors.devices import Devices
from rlhf_ray.actors.group import ActorGroup, Calls, wait_together
from rlhf_ray.actors.liveness import liveness
from rlhf_ray.actors.rollout import RolloutGroup, RolloutWorker
from rlhf_ray.actors.start import Reserved, start_actors
from rlhf_ray.actors.waiting import ActorFailure
from rlhf_ray.actors.watched import actor_class
from rlhf_ray.actors.worker import RankGroup, Worker
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.placement import RolePlacement, RolloutPlacement
from rlhf_ray.config.roles import RoleSpec
from rlhf_ray.config.rollout import Rollout
from rlhf_ray.config.run import Timeouts

logger = logging.getLogger("rlhf_ray")

Watch = Callable[[ActorGroup[Any]], None]
GroupT = TypeVar("GroupT", bound=ActorGroup[Any])
RankGroupT = TypeVar("RankGroupT", bound=RankGroup[Any])

_END_S = 30.0
"""For engines to end in order."""

_END_AFTER_FAILURE_S = 3.0
"""The same where something failed, which is to be told soon."""


def unwatched(group: ActorGroup[Any]) -> None:
    """For `watch`, where nobody looks."""


class Actors:
    """Actors of a job, on bundles that are reserved for all of its roles together; ended on the way out.

    Args:
        placements: of the roles that take places in the cluster, by name.
        timeout_s: that they may wait for their places.
        groups: how many groups of actors a role has, where that is not one.
        watch: gets each group as soon as its actors are started, before they load anything.
    """

    def __init__(
        self,
        placements: Mapping[str, RolePlacement | RolloutPlacement],
        timeout_s: float,
        *,
        autoscaling: bool = False,
        groups: Mapping[str, int] | None = None,
        watch: Watch = unwatched,
    ) -> None:
        self._reserved = Reserved(placements, timeout_s, autoscaling=autoscaling, groups=groups)
        self._watch = watch
        self._ending = ExitStack()
        self._ending.callback(self._reserved.release)

    @classmethod
    def of_job(cls, config: Job, watch: Watch = unwatched, without: Sequence[str] = ()) -> Self:
        """For all roles of a job but those that it can do `without`."""
        logger.info("starting the actors and loading the models")
        placed = [role for role in config.roles if role.placement is not None and role.name not in without]
        return cls(
            {role.placed_as: role.placement for role in placed if role.placement is not None},
            config.placement.placement_timeout_s,
            autoscaling=config.cluster.autoscaling,
            groups=Counter(role.placed_as for role in placed),
            watch=watch,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ActorFailure):  # told now: engines that are still starting may take half a minute to end
            logger.error("%s", str(error).partition("\n")[0])
        self._ending.__exit__(kind, error, trace)

    def ranks(self, role: RoleSpec, worker: type[Worker], group: type[RankGroupT], config: Job) -> RankGroupT:
        """The ranks of a role that holds a model."""
        engine = role.model_engine
        assert engine is not None
        identity = identities(role.name, role.ranks, config.seed, config.run.deterministic)
        actors = start_actors(worker, self._reserved.specs[role.placed_as], role.ranks, identity)
        return self.own(group(role.name, actors, engine.sequence_parallel, sharded=engine.zero_stage == 3))

    def unplaced(self, role: RoleSpec, worker: type[Worker], group: type[GroupT]) -> GroupT:
        """The workers of a role that takes no resources, and so has no place of its own."""
        anywhere = actor_class(worker).options(num_cpus=0)
        identity = identities(role.name, role.ranks, seed=0, deterministic=False)
        return self.own(group(role.name, [anywhere.remote(**identity(rank)) for rank in range(role.ranks)]))

    def engines(
        self,
        placement: RolloutPlacement,
        rollout: Rollout,
        timeouts: Timeouts,
        *,
        deterministic: bool,
    ) -> RolloutGroup:
        """The rollout engines."""
        nodes = placement.nodes_per_engine
        actors = start_actors(
            RolloutWorker,
            self._reserved.specs["rollout"],
            placement.engines * nodes,
            lambda number: {"rank": number // nodes},
        )
        group = RolloutGroup(actors, rollout, deterministic=deterministic, timeouts=timeouts, nodes_per_engine=nodes)
        return self.own_engines(group)

    def start(
        self, worker: type[Any], placed_as: str, count: int, arguments: Callable[[int], dict[str, Any]]
    ) -> list[Any]:
        """Actors of a class of its own kind on the bundles of a role; `own` them as a group."""
        return start_actors(worker, self._reserved.specs[placed_as], count, arguments)

    def own_engines(self, group: RolloutGroup) -> RolloutGroup:
        """The same of engines, whose own processes end before their actors are killed."""
        self.own(group)
        self._ending.push(partial(_end_engines, group))
        return group

    def own(self, group: GroupT) -> GroupT:
        """Show a group in the status, miss its actors when they die, and end it on the way out."""
        liveness.watch(group.role, group.processes)
        self._ending.callback(group.kill)
        self._watch(group)
        return group


def _end_engines(
    rollout: RolloutGroup,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    for problem in rollout.end_engines(_END_S if error is None else _END_AFTER_FAILURE_S):
        logger.warning("a rollout engine did not end in order: %s", problem)


def identities(role: str, ranks: int, seed: int, deterministic: bool) -> Callable[[int], dict[str, Any]]:
    """Constructor arguments of each rank of a role."""
    return lambda rank: {
        "role": role,
        "rank": rank,
        "world_size": ranks,
        "seed": seed,
        "deterministic": deterministic,
    }


def load_models(loads: Mapping[str, Callable[[], Sequence[Calls[None]]]], devices: Devices, timeouts: Timeouts) -> None:
    """Load the models of all roles: at once, but for roles that share devices, which load and leave one after the
    other.

    Args:
        loads: what starts the loading, by the name that `placement` has for the role.
    """
    loading: list[Calls[None]] = []
    for role, load in loads.items():
        started = load()
        if devices.shares(role):
            wait_together(started, timeouts.setup, f"{role}: load_model")
            devices.loaded(role)
        else:
            loading.extend(started)
    wait_together(loading, timeouts.setup, "loading of the models")
