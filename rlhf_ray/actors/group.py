"""N ranks of a role as one: created by one function, called together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.actors.watched import actor_class
from rlhf_ray.cluster.placement import reserve
from rlhf_ray.config.placement import RolePlacement, RolloutPlacement


@dataclass(frozen=True)
class Seat:
    """What one rank of a role reserves, in a bundle that it may share.

    Attributes:
        places: the bundles, one for each rank.
        cpus, gpus: of one rank; a share of the bundle's when roles are colocated.
        threads: that one rank computes with.
        env: environment of its process.
    """

    places: PlacementGroup
    cpus: float
    gpus: float
    threads: int
    env: dict[str, str]


class ActorGroup:
    """The ranks of one role. Calls go to all of them; results come back in rank order."""

    def __init__(self, role: str, actors: Sequence[Any]) -> None:
        self.role = role
        self.actors = list(actors)

    def __len__(self) -> int:
        return len(self.actors)

    def call(self, method: str, *args: Any) -> list[ray.ObjectRef]:
        """Call a method with the same arguments on every rank."""
        return [getattr(actor, method).remote(*args) for actor in self.actors]

    def call_each(self, method: str, per_rank: Sequence[tuple[Any, ...]]) -> list[ray.ObjectRef]:
        """Call a method with each rank's own arguments."""
        return [getattr(actor, method).remote(*args) for actor, args in zip(self.actors, per_rank, strict=True)]

    def call_one(self, rank: int, method: str, *args: Any, num_returns: int = 1) -> Any:
        """Call a method on one rank."""
        return getattr(self.actors[rank % len(self.actors)], method).options(num_returns=num_returns).remote(*args)

    def run(self, method: str, *args: Any, timeout_s: float, setting: str) -> list[Any]:
        """Call a method on every rank and wait for the results."""
        return wait_all(self.call(method, *args), timeout_s, f"{self.role}: {method}", setting)

    def kill(self) -> None:
        """End the processes, whatever they do."""
        for actor in self.actors:
            ray.kill(actor)


def create_group(
    role: str, worker: type, seat: Seat, ranks: int, arguments: Callable[[int], dict[str, Any]]
) -> ActorGroup:
    """Start one process for each rank on its bundle. `arguments` gives a rank's constructor arguments.

    It may be called again for a role whose processes died: nothing of the old ones is reused.
    """
    memory = {} if seat.gpus else KEEP_MEMORY
    env = {"OMP_NUM_THREADS": str(seat.threads), **SHARE_CORES, **HIDE_GPUS, **QUIET, **memory, **seat.env}
    actors = []
    for rank in range(ranks):
        options = {
            "num_cpus": seat.cpus,
            "num_gpus": seat.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                seat.places, placement_group_bundle_index=rank, placement_group_capture_child_tasks=False
            ),
            "runtime_env": {"env_vars": env},
            "max_restarts": 0,
        }
        actors.append(actor_class(worker).options(**options).remote(**arguments(rank)))
    return ActorGroup(role, actors)


# Roles on CPU take turns on the same cores: a thread that waits for others of its process must not spin for long on a
# core that another role needs. One that sleeps at once halves the speed of an engine, whose matrices are small. So many
# turns take a fifth of a millisecond.
SHARE_CORES = {"GOMP_SPINCOUNT": "20000"}

# A role on CPU allocates in each step what it freed in the one before. glibc gives such pages back to the system, which
# clears them anew; in a virtual machine that can take as long as the computing. jemalloc, which Ray brings along, keeps
# them, large ones too (`oversize_threshold:0`), and in huge pages.
KEEP_MEMORY = {
    "LD_PRELOAD": str(Path(ray.__file__).parent / "core" / "libjemalloc.so"),
    "MALLOC_CONF": "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1,metadata_thp:auto,thp:always",
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
    """Places of all roles of a job. Roles that are colocated share bundles, each taking an equal part."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._seats: dict[str, Seat] = {}

    def seat_trained(self, role: str, placement: RolePlacement, guests: int) -> Seat:
        """A role with bundles of its own, which `guests` other groups will share."""
        bundle = _bundle(placement.cpus, placement.gpus)
        places = reserve(role, [bundle] * (placement.ranks or 1), placement.strategy, self._timeout_s)
        self._seats[role] = Seat(
            places,
            cpus=_share(placement.cpus, guests + 1),
            gpus=_share(placement.gpus, guests + 1),
            threads=placement.threads or max(1, int(placement.cpus)),
            env=placement.env,
        )
        return self._seats[role]

    def seat_guest(self, role: str, placement: RolePlacement) -> Seat:
        """A role on the bundles of the one it is colocated with."""
        assert placement.colocate is not None
        host = self._seats[placement.colocate]
        self._seats[role] = Seat(host.places, host.cpus, host.gpus, placement.threads or host.threads, placement.env)
        return self._seats[role]

    def seat_engines(self, placement: RolloutPlacement) -> Seat:
        """Rollout engines; the workers of one engine share a bundle, and so a node."""
        cpus, gpus = placement.cpus * placement.tensor_parallel, placement.gpus * placement.tensor_parallel
        places = reserve("rollout", [_bundle(cpus, gpus)] * placement.engines, placement.strategy, self._timeout_s)
        self._seats["rollout"] = Seat(
            places, cpus, gpus, placement.threads or max(1, int(placement.cpus)), placement.env
        )
        return self._seats["rollout"]

    def release(self) -> None:
        """Give all bundles back."""
        for places in {id(seat.places): seat.places for seat in self._seats.values()}.values():
            remove_placement_group(places)
        self._seats.clear()


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    bundle = {key: amount for key, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    return bundle or {"CPU": 0.001}  # Ray has no empty bundles


def _share(amount: float, parts: int) -> float:
    """Ray counts in ten-thousandths; rounding down keeps the shares within the whole."""
    return amount if parts == 1 else math.floor(amount / parts * 10_000) / 10_000
