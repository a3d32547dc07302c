"""N ranks of a role as one: created by one function, called together."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.actors.liveness import liveness
from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.actors.watched import actor_class
from rlhf_ray.cluster.assignment import requests_of
from rlhf_ray.cluster.placement import Place, reserve
from rlhf_ray.config.placement import Placed, RolloutPlacement

if TYPE_CHECKING:  # it is a module of groups itself
    from rlhf_ray.actors.rollout import GeneratedShard


@dataclass(frozen=True)
class Seat:
    """What one rank of a role reserves, on a place that it may share.

    Attributes:
        places: in rank order.
        cpus, gpus: of one rank; a share of the place's when roles are colocated.
        threads: that one rank computes with.
        env: environment of its process.
        span: places that one rank sits on, by their devices' ids; 0 for its own place, by Ray's count of GPUs.
    """

    places: list[Place]
    cpus: float
    gpus: float
    threads: int
    env: dict[str, str]
    span: int = 0

    def place_of(self, rank: int) -> Place:
        """Where Ray starts the rank's process."""
        return self.places[rank * (self.span or 1)]

    def devices_of(self, rank: int) -> dict[str, str]:
        """Environment that shows a rank the devices of all its places."""
        shown = [device for place in self.places[rank * self.span : (rank + 1) * self.span] for device in place.devices]
        return {"CUDA_VISIBLE_DEVICES": ",".join(shown), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"} if shown else {}


class ActorGroup:
    """The ranks of one role. Calls go to all of them; results come back in rank order.

    Args:
        sequence_parallel: neighbours that share sequences.
        sharded: weights are spread over all ranks, so that every rank takes part in every pass (ZeRO-3).

    Attributes:
        shares: parts that samples are dealt into: one for each rank, or for as many neighbours as share sequences.
    """

    def __init__(self, role: str, actors: Sequence[Any], sequence_parallel: int = 1, *, sharded: bool = False) -> None:
        self.role = role
        self.actors = list(actors)
        self.shares = len(self.actors) // sequence_parallel
        self._sharded = sharded

    def __len__(self) -> int:
        return len(self.actors)

    @property
    def processes(self) -> list[Any]:
        """All actors, those that calls do not go to too."""
        return self.actors

    def call(self, method: str, *args: Any) -> list[ray.ObjectRef]:
        """Call a method with the same arguments on every rank."""
        return [getattr(actor, method).remote(*args) for actor in self.actors]

    def call_each(self, method: str, per_share: Sequence[tuple[Any, ...]]) -> list[ray.ObjectRef]:
        """Call a method on every rank with the arguments of its share."""
        together = len(self.actors) // self.shares
        per_rank = [arguments for arguments in per_share for _ in range(together)]
        return [getattr(actor, method).remote(*args) for actor, args in zip(self.actors, per_rank, strict=True)]

    def call_on(self, method: str, shard: "GeneratedShard") -> list[ray.ObjectRef]:
        """Call a method on a shard, on as many ranks as it takes, which take turns by the shard's number.

        The method's arguments are the trajectories, the number of a part of them, and how many parts there are.
        """
        parts = parts_of(len(shard.facts.uids), shard.shards, self.shares, sharded=self._sharded)
        work = range(self.shares) if self._sharded else range(shard.number * parts, (shard.number + 1) * parts)
        together = len(self.actors) // self.shares
        return [
            getattr(actor, method).remote(shard.trajectories, number % parts, parts)
            for number in work
            for actor in self.actors[number % self.shares * together :][:together]
        ]

    def call_one(self, rank: int, method: str, *args: Any, num_returns: int = 1) -> Any:
        """Call a method on one rank."""
        return getattr(self.actors[rank % len(self.actors)], method).options(num_returns=num_returns).remote(*args)

    def run(self, method: str, *args: Any, timeout_s: float, setting: str) -> list[Any]:
        """Call a method on every rank and wait for the results."""
        return wait_all(self.call(method, *args), timeout_s, f"{self.role}: {method}", setting)

    def kill(self) -> None:
        """End the processes, whatever they do."""
        liveness.forget(self.actors)
        for actor in self.actors:
            ray.kill(actor)


_PIECES_PER_SHARE = 8


def parts_of(samples: int, shards: int, shares: int, *, sharded: bool) -> int:
    """Parts that a shard of `samples` is cut into, when a step has so many shards.

    There are so many that each share of the ranks gets some pieces of work, which evens out how long they take; but no
    more, because each is a call that the controller makes and answers: if all ranks worked on each shard, there would
    be shards × ranks of them. ZeRO-3 needs all ranks in each pass, all with a part or all with the whole.
    """
    if sharded:
        return shares if samples >= shares else 1
    return min(samples, shares, -(-_PIECES_PER_SHARE * shares // shards))


def create_group(
    role: str,
    worker: type,
    seat: Seat,
    ranks: int,
    arguments: Callable[[int], dict[str, Any]],
    sequence_parallel: int = 1,
    *,
    sharded: bool = False,
) -> ActorGroup:
    """Start one process for each rank on its bundle. `arguments` gives a rank's constructor arguments.

    It may be called again for a role whose processes died: nothing of the old ones is reused.
    """
    memory = {} if seat.places[0].devices else KEEP_MEMORY
    env = {"OMP_NUM_THREADS": str(seat.threads), **SHARE_CORES, **HIDE_GPUS, **QUIET, **memory, **seat.env}
    actors = []
    for rank in range(ranks):
        place = seat.place_of(rank)
        options = {
            "num_cpus": seat.cpus,
            "num_gpus": seat.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                place.group, placement_group_bundle_index=place.bundle, placement_group_capture_child_tasks=False
            ),
            "runtime_env": {"env_vars": env | seat.devices_of(rank)},
            "max_restarts": 0,
        }
        actors.append(actor_class(worker).options(**options).remote(**arguments(rank)))
    liveness.watch(role, actors)
    return ActorGroup(role, actors, sequence_parallel, sharded=sharded)


# Roles on CPU take turns on the same cores: a thread that waits for others of its process must not spin for long on a
# core that another role needs. One that sleeps at once halves the speed of an engine, whose matrices are small. So many
# turns take a fifth of a millisecond.
SHARE_CORES = {"GOMP_SPINCOUNT": "20000"}

# A role on CPU allocates in each step what it freed in the one before. glibc gives such pages back to the system, which
# clears them anew; in a virtual machine that can take as long as the computing. jemalloc, which Ray brings along, keeps
# them, large ones too (`oversize_threshold:0`), and in huge pages. What was not used for a second stays too, but
# the kernel may take it when memory gets short (`muzzy_decay_ms:-1`); else a process would grow with each of its steps.
KEEP_MEMORY = {
    "LD_PRELOAD": str(Path(ray.__file__).parent / "core" / "libjemalloc.so"),
    "MALLOC_CONF": "oversize_threshold:0,dirty_decay_ms:1000,muzzy_decay_ms:-1,metadata_thp:auto,thp:always",
}

# Ray shows all GPUs to an actor that reserves none, unless told to hide them.
HIDE_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}

# Libraries that write to an actor's log for every file they load.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Seating:
    """Seats of all roles of a job, reserved together. Roles that are colocated share places, each taking an equal part.

    Args:
        roles: as `JobConfig.places`.

    Attributes:
        seats: of each role.
    """

    def __init__(self, roles: Mapping[str, Placed], timeout_s: float, *, autoscaling: bool) -> None:
        requests = requests_of({role: placed.placement for role, placed in roles.items()})
        self._reservation = reserve(requests, timeout_s, autoscaling=autoscaling)
        self.seats = {}
        for role, (placement, _) in roles.items():
            host = placement.colocate or role
            place = roles[host].placement
            groups = {other: count for other, (at, count) in roles.items() if host in (other, at.colocate)}
            workers = placement.tensor_parallel // placement.parts if isinstance(placement, RolloutPlacement) else 1
            span = workers if isinstance(placement, RolloutPlacement) and host != role else 0
            # Engines that sit with others are shown their devices: Ray can't count parts of several GPUs.
            counted = sum(groups.values()) - (host != "rollout" and "rollout" in groups)
            self.seats[role] = Seat(
                self._reservation.of(host),
                cpus=_share(place.cpus * (1 if span else workers), sum(groups.values())),
                gpus=0.0 if span else _share(place.gpus * workers, counted),
                threads=placement.threads or place.threads or max(1, int(place.cpus)),
                env=placement.env,
                span=span,
            )

    def release(self) -> None:
        """Give all places back."""
        self._reservation.release()


def _share(amount: float, parts: int) -> float:
    """Ray counts in ten-thousandths; rounding down keeps the shares within the whole."""
    return amount if parts == 1 else math.floor(amount / parts * 10_000) / 10_000
