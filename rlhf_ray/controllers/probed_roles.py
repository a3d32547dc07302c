"""The actors that `rlhf-ray calibrate` measures: those of a job, with clocks."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.actors.group import ActorGroup, wait_together
from rlhf_ray.actors.probe import PairGroup, PairWorker, ProbeGroup, ProbeRolloutWorker, ProbeWorker
from rlhf_ray.actors.rollout import RolloutGroup
from rlhf_ray.actors.worker import join_collectives_of
from rlhf_ray.config.placement import RolePlacement, RolloutPlacement
from rlhf_ray.config.rollout import Rollout, RolloutEngine, Sampling
from rlhf_ray.config.run import Limit, Timeouts
from rlhf_ray.config.training import Dtype
from rlhf_ray.controllers.roles import Actors, identities
from rlhf_ray.engines.rollout_setup import RolloutSetup
from rlhf_ray.models.config_json import read_shape
from rlhf_ray.planner.calibration import ProcessMemory
from rlhf_ray.planner.measurements import MIB
from rlhf_ray.planner.work import BYTES
from rlhf_ray.platform import cores

DTYPE: Dtype = "bfloat16"
LIMIT = Limit(300.0, "the limit of a calibration")
TIMEOUTS = Timeouts(setup_s=LIMIT.seconds, rollout_s=LIMIT.seconds, sync_s=LIMIT.seconds)


@dataclass(frozen=True)
class ProbedRoles:
    """A policy that holds no model yet, and engines.

    Attributes:
        process_s, engine_s: seconds until the policy was there, and the engines.
    """

    policy: ProbeGroup
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
    placements: dict[str, RolePlacement | RolloutPlacement] = {
        "policy": RolePlacement(cpus=0, gpus=1 if gpus else 0, threads=threads),
        "rollout": RolloutPlacement(colocate="policy") if beside else own,
    }
    settings = RolloutEngine(
        max_model_len=4096, max_num_seqs=256, prefix_caching=False, gpu_memory_utilization=0.4, cpu_kv_cache_gib=1
    )
    rollout = Rollout(sampling=Sampling(max_new_tokens=256), engine=settings)
    with Actors(placements, LIMIT.seconds) as actors:
        began = time.perf_counter()
        identity = identities("policy", 1, seed=0, deterministic=False)
        policy = actors.own(ProbeGroup("policy", actors.start(ProbeWorker, "policy", 1, identity)))
        started = actors.start(ProbeRolloutWorker, "rollout", len(models), lambda rank: {"rank": rank})
        engines = [
            actors.own_engines(RolloutGroup([actor], rollout, deterministic=False, timeouts=TIMEOUTS))
            for actor in started
        ]
        setups = [RolloutSetup(str(model), settings, DTYPE, 1, seed=0, beside_policy=beside) for model in models]
        waiting = list(zip(engines, setups, strict=True))
        # An engine counts what is free on its device, so those on one device start one after the other.
        at_once = 1 if beside else len(setups)
        loading = [engine.load_model(setup) for engine, setup in waiting[:at_once]]
        join_collectives_of([policy], TIMEOUTS)
        process_s = time.perf_counter() - began
        wait_together(loading, LIMIT, "rollout: load_model")
        for engine, setup in waiting[at_once:]:
            engine.load_model(setup).wait(LIMIT)
        engine_s = time.perf_counter() - began
        weights = read_shape(str(models[0])).parameters * BYTES[DTYPE]
        [rank_memory] = policy.call(ProbeWorker.memory).wait(LIMIT)
        first = ActorGroup[ProbeRolloutWorker]("rollout", started[:1])
        [engine_bytes] = first.call(ProbeRolloutWorker.memory).wait(LIMIT)
        memory = ProcessMemory(rank_mib=rank_memory / MIB, engine_mib=max(0.0, engine_bytes - weights) / MIB)
        yield ProbedRoles(policy, engines, process_s, engine_s, memory)


@contextmanager
def probed_pair(on_gpus: bool) -> Iterator[PairGroup]:
    """Two processes that have met, each with its own device or its half of the cores."""
    placement = RolePlacement(ranks=2, cpus=0, gpus=1 if on_gpus else 0, threads=max(1, cores() // 2))
    with Actors({"pair": placement}, LIMIT.seconds) as actors:
        pair = actors.own(PairGroup("pair", actors.start(PairWorker, "pair", 2, lambda rank: {"rank": rank})))
        [(host, port)] = pair.call_rank(0, PairWorker.address).wait(LIMIT)
        pair.call(PairWorker.join, host, port, LIMIT.seconds).wait(LIMIT)
        yield pair
