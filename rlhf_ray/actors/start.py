"""Starting the processes of roles on the bundles that are reserved for them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.actors.watched import actor_class
from rlhf_ray.cluster.assignment import PlacementError, requests_of
from rlhf_ray.cluster.placement import Bundle, reserve
from rlhf_ray.config.placement import DEFAULT_THREADS, RolePlacement, RolloutPlacement


@dataclass(frozen=True)
class ResourceSpec:
    """What each rank of a role takes of the bundles that are reserved for it, and perhaps for others.

    Attributes:
        bundles: in rank order.
        cpus, gpus: of one rank; a fraction of the bundle's when roles are colocated.
        threads: that one rank computes with.
        env: environment of its process.
        span: bundles that one rank sits on, by their devices' ids; 0 for its own bundle, by Ray's count of GPUs.
    """

    bundles: list[Bundle]
    cpus: float
    gpus: float
    threads: int
    env: dict[str, str]
    span: int = 0

    def bundle_of(self, rank: int) -> Bundle:
        """Where Ray starts the rank's process."""
        return self.bundles[rank * (self.span or 1)]

    def devices_of(self, rank: int) -> dict[str, str]:
        """Environment that shows a rank the devices of all its bundles.

        Raises:
            PlacementError: they are several slices of GPUs.
        """
        own = self.bundles[rank * self.span : (rank + 1) * self.span]
        shown = [device for bundle in own for device in bundle.devices]
        if len(shown) > 1 and any(device.startswith("MIG-") for device in shown):
            raise PlacementError(
                "rollout",
                f"placement.rollout: an engine would sit on {' and '.join(shown)}, but CUDA shows a process one slice "
                "of a GPU (MIG) only: set placement.rollout.tensor_parallel to 1, or use whole GPUs",
                rank * self.span,
                {},
            )
        return {"CUDA_VISIBLE_DEVICES": ",".join(shown), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"} if shown else {}


def start_actors(worker: type, spec: ResourceSpec, count: int, arguments: Callable[[int], dict[str, Any]]) -> list[Any]:
    """Start one process for each rank on its bundle. `arguments` gives a rank's constructor arguments.

    It may be called again for a role whose processes died: nothing of the old ones is reused.
    """
    memory = {} if spec.bundles[0].devices else KEEP_MEMORY
    env = {"OMP_NUM_THREADS": str(spec.threads), **SHARE_CORES, **HIDE_GPUS, **QUIET, **memory, **spec.env}
    actors = []
    for rank in range(count):
        bundle = spec.bundle_of(rank)
        options = {
            "num_cpus": spec.cpus,
            "num_gpus": spec.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                bundle.group, placement_group_bundle_index=bundle.index, placement_group_capture_child_tasks=False
            ),
            "runtime_env": {"env_vars": env | spec.devices_of(rank)},
            "max_restarts": 0,
        }
        actors.append(actor_class(worker).options(**options).remote(**arguments(rank)))
    return actors


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


class Reserved:
    """Bundles for all roles of a job, reserved together. Colocated roles sit on the same bundles, each taking an equal
    part of them.

    Args:
        placements: of the roles that sit in the cluster, by name.
        groups: how many groups of actors a role has, where that is not one.

    Attributes:
        specs: of each role.
    """

    def __init__(
        self,
        placements: Mapping[str, RolePlacement | RolloutPlacement],
        timeout_s: float,
        *,
        autoscaling: bool,
        groups: Mapping[str, int] | None = None,
    ) -> None:
        self._reservation = reserve(requests_of(placements), timeout_s, autoscaling=autoscaling)
        self.specs = {}
        for role, placement in placements.items():
            host = placement.colocate or role
            bundle = placements[host]
            sitting = {
                other: (groups or {}).get(other, 1) for other, at in placements.items() if host in (other, at.colocate)
            }
            workers, span = 1, 0
            if isinstance(placement, RolloutPlacement):
                workers = placement.workers_per_node
                span = 0 if host == role else workers
            # Engines that sit with others are shown their devices: Ray can't count parts of several GPUs.
            counted = sum(sitting.values()) - (host != "rollout" and "rollout" in sitting)
            self.specs[role] = ResourceSpec(
                self._reservation.of(host),
                cpus=_equal_part(bundle.cpus * (1 if span else workers), sum(sitting.values())),
                gpus=0.0 if span else _equal_part(bundle.gpus * workers, counted),
                threads=placement.threads or bundle.threads or max(1, int(bundle.cpus)),
                env=({} if placement.threads or bundle.threads else {DEFAULT_THREADS: "1"}) | placement.env,
                span=span,
            )

    def release(self) -> None:
        """Give all bundles back."""
        self._reservation.release()


def _equal_part(amount: float, count: int) -> float:
    """Ray counts in ten-thousandths; rounding down keeps the parts within the whole."""
    return amount if count == 1 else math.floor(amount / count * 10_000) / 10_000
