"""The actors that `rlhf-ray calibrate` measures: those of a job, with clocks."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rlhf_ray.actors.group import ActorGroup, Seating, create_group
from rlhf_ray.actors.probe import PairWorker, ProbeRolloutWorker, ProbeWorker
from rlhf_ray.actors.rollout import RolloutGroup
from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.cluster.planner.folders import read_shape
from rlhf_ray.cluster.planner.measurements import MIB
from rlhf_ray.cluster.planner.processes import ProcessMemory
from rlhf_ray.cluster.planner.work import BYTES
from rlhf_ray.config.placement import Placed, RolePlacement, RolloutPlacement
from rlhf_ray.config.rollout import Rollout, RolloutEngine, Sampling
from rlhf_ray.config.run import Timeouts
from rlhf_ray.config.training import Dtype
from rlhf_ray.controllers.roles import join_collectives
from rlhf_ray.engines.rollout_setup import RolloutSetup
from rlhf_ray.platform import cores

DTYPE: Dtype = "bfloat16"
TIMEOUT_S = 300.0
SETTING = "the limit of a calibration"


@dataclass(frozen=True)
class ProbedRoles:
    """A policy that holds no model yet, and engines.

    Attributes:
        process_s, engine_s: seconds until the policy was there, and the engines.
    """

    policy: ActorGroup
    engines: list[RolloutGroup]
    process_s: float
    engine_s: float
    memory: ProcessMemory


@contextmanager
def probed_roles(gpus: int, threads: int, models: Sequence[Path]) -> Iterator[ProbedRoles]:
    """A policy without a model yet, and an engine of each model, started at the same time; on the same device where
    there is one only."""
    beside = gpus == 1
    own = RolloutPlacement(engines=len(models), cpus=0, gpus=1 if gpus else 0, threads=threads)
    places = {
        "policy": Placed(RolePlacement(cpus=0, gpus=1 if gpus else 0, threads=threads), 1),
        "rollout": Placed(RolloutPlacement(colocate="policy") if beside else own, 1),
    }
    seating = Seating(places, TIMEOUT_S, autoscaling=False)
    started: list[ActorGroup] = []
    try:
        began = time.perf_counter()
        policy = create_group("policy", ProbeWorker, seating.seats["policy"], 1, _identity)
        engines = create_group(
            "rollout", ProbeRolloutWorker, seating.seats["rollout"], len(models), lambda rank: {"rank": rank}
        )
        started += [policy, engines]
        settings = RolloutEngine(
            max_model_len=4096, max_num_seqs=256, prefix_caching=False, gpu_memory_utilization=0.4, cpu_kv_cache_gib=1
        )
        rollout = Rollout(sampling=Sampling(max_new_tokens=256), engine=settings)
        setups = [RolloutSetup(str(model), settings, DTYPE, 1, seed=0, beside_policy=beside) for model in models]
        # An engine counts what is free on its device, so those on one device start one after the other.
        at_once = 1 if beside else len(setups)
        waiting = list(zip(engines.actors, setups, strict=True))
        loading = [actor.load_model.remote(setup) for actor, setup in waiting[:at_once]]
        join_collectives([policy], Timeouts(setup_s=TIMEOUT_S))
        process_s = time.perf_counter() - began
        wait(loading, "rollout: load_model")
        for actor, setup in waiting[at_once:]:
            wait([actor.load_model.remote(setup)], "rollout: load_model")
        engine_s = time.perf_counter() - began
        groups = [RolloutGroup([actor], rollout, deterministic=False, timeout_s=TIMEOUT_S) for actor in engines.actors]
        weights = read_shape(str(models[0])).parameters * BYTES[DTYPE]
        memory = ProcessMemory(
            rank_mib=one(policy, "memory") / MIB, engine_mib=max(0.0, one(groups[0], "memory") - weights) / MIB
        )
        yield ProbedRoles(policy, groups, process_s, engine_s, memory)
        wait(engines.call("shutdown"), "rollout: shutdown")
    finally:
        for group in started:
            group.kill()
        seating.release()


def _identity(rank: int) -> dict[str, Any]:
    return {"role": "policy", "rank": rank, "world_size": 1, "seed": 0, "deterministic": False}


@contextmanager
def probed_pair(on_gpus: bool) -> Iterator[ActorGroup]:
    """Two processes that have met, each with its own device or its half of the cores."""
    placement = RolePlacement(ranks=2, cpus=0, gpus=1 if on_gpus else 0, threads=max(1, cores() // 2))
    seating = Seating({"pair": Placed(placement, 1)}, TIMEOUT_S, autoscaling=False)
    pair = None
    try:
        pair = create_group("pair", PairWorker, seating.seats["pair"], 2, lambda rank: {"rank": rank})
        host, port = one(pair, "address")
        wait(pair.call("join", host, port, TIMEOUT_S), "pair: join")
        yield pair
    finally:
        if pair is not None:
            pair.kill()
        seating.release()


def one(group: ActorGroup, method: str, *args: Any) -> Any:
    """What rank 0 answers."""
    return wait([group.call_one(0, method, *args)], f"{group.role}: {method}")[0]


def wait(refs: Sequence[ray.ObjectRef], what: str) -> list[Any]:
    """As `wait_all`."""
    return wait_all(refs, TIMEOUT_S, what, SETTING)
