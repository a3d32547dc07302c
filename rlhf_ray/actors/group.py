"""N ranks of a role as one. What can be asked of them is a method of a subclass, beside the role's worker."""

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, TypeVarTuple, overload

import ray

from rlhf_ray.actors.liveness import liveness
from rlhf_ray.actors.shards import GeneratedShard
from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.actors.watched import Watched
from rlhf_ray.config.run import Limit
from rlhf_ray.data.trajectory import TrajectoryBatch

Worker = TypeVar("Worker", bound=Watched)
Arguments = ParamSpec("Arguments")
Each = TypeVarTuple("Each")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Calls(Generic[Result]):
    """Calls that run on ranks of a role.

    Attributes:
        refs: to their results, in rank order.
        what: for errors, such as `policy: update`.
    """

    refs: list[ray.ObjectRef]
    what: str

    def wait(self, limit: Limit) -> list[Result]:
        """The results in rank order. Raises as `wait_all`."""
        return wait_all(self.refs, limit.seconds, self.what, limit.setting)


def wait_together(calls: Sequence[Calls[Any]], limit: Limit, what: str) -> None:
    """Wait for calls to several groups, whichever fails first. Raises as `wait_all`."""
    wait_all([ref for each in calls for ref in each.refs], limit.seconds, what, limit.setting)


def on_all(
    method: Callable[Concatenate[Worker, Arguments], Result],
) -> Callable[Concatenate[Any, Arguments], Calls[Result]]:
    """A group's method that calls the worker's method of the same name with the same arguments on every rank."""

    @wraps(method)
    def call(group: "ActorGroup[Worker]", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Calls[Result]:
        return group.call(method, *args, **kwargs)

    return call


class ActorGroup(Generic[Worker]):
    """The ranks of one role. Calls go to all of them; results come back in rank order.

    Args:
        sp_size: neighbouring ranks that share sequences.
        sharded: weights are spread over all ranks, so that every rank takes part in every pass (ZeRO-3).

    Attributes:
        dp_size: parts that samples are divided into: one for each rank, or for as many neighbours as share sequences.
    """

    def __init__(self, role: str, actors: Sequence[Any], sp_size: int = 1, *, sharded: bool = False) -> None:
        self.role = role
        self.actors = list(actors)
        self.sp_size = sp_size
        self.dp_size = len(self.actors) // sp_size
        self._sharded = sharded

    def __len__(self) -> int:
        return len(self.actors)

    @property
    def processes(self) -> list[Any]:
        """All actors, those that calls do not go to too."""
        return self.actors

    @overload
    def call(
        self,
        method: Callable[Concatenate[Worker, Arguments], Coroutine[Any, Any, Result]],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Calls[Result]: ...

    @overload
    def call(
        self,
        method: Callable[Concatenate[Worker, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Calls[Result]: ...

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Calls[Any]:
        """Call a method of the worker with the same arguments on every rank."""
        return self._calls([method_of(actor, method).remote(*args, **kwargs) for actor in self.actors], method)

    @overload
    def call_each(
        self, method: Callable[[Worker, *Each], Coroutine[Any, Any, Result]], per_dp_rank: Sequence[tuple[*Each]]
    ) -> Calls[Result]: ...

    @overload
    def call_each(
        self, method: Callable[[Worker, *Each], Result], per_dp_rank: Sequence[tuple[*Each]]
    ) -> Calls[Result]: ...

    def call_each(self, method: Callable[..., Any], per_dp_rank: Sequence[tuple[Any, ...]]) -> Calls[Any]:
        """Call a method on every rank with the arguments of its data-parallel rank."""
        per_rank = [arguments for arguments in per_dp_rank for _ in range(self.sp_size)]
        refs = [method_of(actor, method).remote(*args) for actor, args in zip(self.actors, per_rank, strict=True)]
        return self._calls(refs, method)

    def call_shard(
        self, method: Callable[[Worker, TrajectoryBatch, int, int], Result], shard: GeneratedShard
    ) -> Calls[Result]:
        """Call a method on a shard, on as many ranks as it takes, which take turns by the shard's number.

        The method's arguments are the trajectories, the number of a slice of them, and how many slices there are.
        """
        slices = slices_of(len(shard.facts.uids), shard.shards, self.dp_size, sharded=self._sharded)
        work = range(self.dp_size) if self._sharded else range(shard.number * slices, (shard.number + 1) * slices)
        refs = [
            method_of(actor, method).remote(shard.trajectories, number % slices, slices)
            for number in work
            for actor in self.actors[number % self.dp_size * self.sp_size :][: self.sp_size]
        ]
        return self._calls(refs, method)

    def call_rank(
        self,
        rank: int,
        method: Callable[Concatenate[Worker, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Calls[Result]:
        """Call a method on one rank; they take turns by the number."""
        return self._calls([method_of(self.actors[rank % len(self)], method).remote(*args, **kwargs)], method)

    def call_rank_for_two(
        self,
        rank: int,
        method: Callable[Concatenate[Worker, Arguments], Any],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> tuple[ray.ObjectRef, ray.ObjectRef]:
        """The same of a method that gives two objects: a large one, which stays where it is, and what to know of it."""
        called = method_of(self.actors[rank % len(self)], method).options(num_returns=2)
        first, second = called.remote(*args, **kwargs)
        return first, second

    drain_spans = on_all(Watched.drain_spans)

    def kill(self) -> None:
        """End the processes, whatever they do."""
        liveness.forget(self.processes)
        for actor in self.processes:
            ray.kill(actor)

    def _calls(self, refs: list[ray.ObjectRef], method: Callable[..., Any]) -> Calls[Any]:
        return Calls(refs, f"{self.role}: {method.__name__}")


def method_of(actor: Any, method: Callable[..., Any]) -> Any:
    """What calls a method of the actor's class on it."""
    return getattr(actor, method.__name__)


_SLICES_PER_DP_RANK = 8


def slices_of(samples: int, shards: int, dp_size: int, *, sharded: bool) -> int:
    """Slices that a shard of `samples` is cut into, when a step has so many shards.

    There are so many that each data-parallel rank gets some pieces of work, which evens out how long they take; but no
    more, because each is a call that the controller makes and answers: if all ranks worked on each shard, there would
    be shards × ranks of them. ZeRO-3 needs all ranks in each pass, all with a slice or all with the whole.
    """
    if sharded:
        return dp_size if samples >= dp_size else 1
    return min(samples, dp_size, -(-_SLICES_PER_DP_RANK * dp_size // shards))
