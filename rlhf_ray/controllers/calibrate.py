"""Measures what this machine gives, with the actors that a job has: `rlhf-ray calibrate`.

Random models of a few shapes go through the policy's passes, its optimizer, the engines and a weight sync. Each
measurement has the machine for itself; only the starts overlap, as they do in a job.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray

from rlhf_ray.actors.group import ActorGroup, Seating, create_group
from rlhf_ray.actors.probe import PairWorker, PassTimes, ProbeRolloutWorker, ProbeWorker, Samples
from rlhf_ray.actors.rollout import RolloutGroup
from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.cluster.planner.calibration import Calibration, Device, RayRates, Start
from rlhf_ray.cluster.planner.devices import GB
from rlhf_ray.cluster.planner.folders import read_shape
from rlhf_ray.cluster.planner.measurements import (
    MIB,
    CollectiveSeconds,
    DecodeSeconds,
    Measurements,
    PassSeconds,
    SyncSeconds,
    calibration_of,
)
from rlhf_ray.cluster.planner.processes import ProcessMemory
from rlhf_ray.cluster.planner.shapes import ModelShape
from rlhf_ray.cluster.planner.work import BYTES, Sequences
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config.placement import Cluster, Placed, RolePlacement, RolloutPlacement
from rlhf_ray.config.rollout import Rollout, RolloutEngine, Sampling
from rlhf_ray.config.run import Timeouts
from rlhf_ray.config.training import Dtype, Policy, TrainingEngine
from rlhf_ray.controllers.roles import join_collectives
from rlhf_ray.data.requests import PromptRequest
from rlhf_ray.engines.rollout_setup import RolloutSetup
from rlhf_ray.models.random_llama import LlamaSize, write_random_llama
from rlhf_ray.platform import cores, device_names, machine_name

logger = logging.getLogger("rlhf_ray")

_DTYPE: Dtype = "bfloat16"
_TIMEOUT_S = 300.0
_SETTING = "the limit of a calibration"
_REPEATS = 2
_BUCKET_MIB = 64
_CALLS = 300


@dataclass(frozen=True)
class Decoding:
    """A batch that an engine generates."""

    sequences: int
    prompt: int


@dataclass(frozen=True)
class Sizes:
    """What is measured with: large enough to tell one factor from another, small enough for two minutes.

    Attributes:
        product: rows of a square matrix.
        copy, collective, stored: bytes.
        models: tiny, narrow and deep, wide and flat.
        passes: micro-batches: one that is long in all, long sequences, many scored tokens, and short ones.
        short, long: tokens of responses, whose difference tells the time of a token.
    """

    product: int
    copy: int
    collective: int
    stored: int
    models: tuple[LlamaSize, ...]
    passes: tuple[Samples, ...]
    decoding: tuple[Decoding, ...]
    short: int = 4
    long: int = 28


SIZES: dict[Device, Sizes] = {
    "cpu": Sizes(
        product=2048,
        copy=256 * MIB,
        collective=64 * MIB,
        stored=64 * MIB,
        models=(LlamaSize(256, 2, 704, 4096), LlamaSize(512, 10, 1408, 8192), LlamaSize(1024, 4, 2816, 32768)),
        passes=(Samples(16, 124, 4), Samples(2, 1020, 4), Samples(16, 32, 32), Samples(2, 28, 4)),
        decoding=(Decoding(1, 16), Decoding(8, 16), Decoding(48, 16), Decoding(16, 384)),
    ),
    "gpu": Sizes(
        product=8192,
        copy=1024 * MIB,
        collective=256 * MIB,
        stored=256 * MIB,
        models=(LlamaSize(2048, 24, 5632, 32768), LlamaSize(4096, 8, 14336, 131072)),
        passes=(Samples(64, 252, 4), Samples(4, 4092, 4), Samples(64, 64, 64), Samples(2, 28, 4)),
        decoding=(Decoding(1, 16), Decoding(16, 16), Decoding(128, 16), Decoding(64, 2048)),
        long=68,
    ),
}


def calibrate(sizes: Sizes | None = None) -> Calibration:
    """What this machine gives.

    Args:
        sizes: of what is measured with; by default those of its kind of device.

    Raises:
        RoleTimeout, RoleFailure: as `wait_all`.
    """
    devices = device_names()
    device: Device = "gpu" if devices else "cpu"
    sizes = sizes or SIZES[device]
    with TemporaryDirectory(prefix="rlhf-ray-calibrate-") as folder, ray_session(Cluster(address="local"), "calibrate"):
        logger.info("writing random models")
        models = [write_random_llama(Path(folder) / str(n), size) for n, size in enumerate(sizes.models)]
        collectives = _collectives(sizes, on_gpus=len(devices)) if len(devices) != 1 else None
        return calibration_of(_measure(device, devices, sizes, models, collectives))


def _measure(
    device: Device,
    devices: Sequence[str],
    sizes: Sizes,
    models: Sequence[Path],
    collectives: CollectiveSeconds | None,
) -> Measurements:
    threads = cores()
    shapes = [read_shape(str(model)) for model in models]
    # On a CPU several engines start together; a GPU has room for one.
    engine_models = list(models) if device == "cpu" else [models[-1]]
    logger.info("starting a policy and %d engine%s", len(engine_models), "" if len(engine_models) == 1 else "s")
    with _roles(len(devices), threads, engine_models) as roles:
        policy = roles.policy
        logger.info("measuring peaks")
        flops: dict[Dtype, float] = {
            "bfloat16": _one(policy, "peak_flops", "bfloat16", sizes.product),
            "float32": _one(policy, "peak_flops", "float32", sizes.product),
        }
        memory = _one(policy, "memory_bandwidth", sizes.copy)
        ray_rates = _ray_rates(policy, sizes)
        logger.info("measuring generation")
        decoding = [
            point
            for model, engine in zip(engine_models, roles.engines, strict=True)
            for point in _decoding(engine, read_shape(str(model)), sizes)
        ]
        pause_s = _pause_s(roles.engines[0])
        passes: list[PassSeconds] = []
        syncs: list[SyncSeconds] = []
        loads: list[float] = []
        for model, shape in zip(models, shapes, strict=True):
            logger.info("measuring passes of %.0f million weights", shape.parameters / 1e6)
            loaded = _one(policy, "load", _policy(model, sizes))
            loads.append(shape.parameters * BYTES[_DTYPE] / loaded / GB)
            passes += _passes(policy, shape, sizes)
            if model in engine_models and len(devices) != 1:  # on its own device a sync is of another kind
                engine = roles.engines[engine_models.index(model)]
                syncs.append(SyncSeconds(shape, _sync_s(policy, engine)))
        return Measurements(
            device=device,
            machine=machine_name(),
            threads=None if devices else threads,
            dtype=_DTYPE,
            flops=flops,
            memory=memory,
            passes=passes,
            decoding=decoding,
            syncs=syncs,
            pause_s=pause_s,
            collectives=collectives,
            ray=ray_rates,
            start=Start(process_s=roles.process_s, engine_s=roles.engine_s, load_gb_s=max(loads)),
            memory_of=roles.memory,
        )


@dataclass(frozen=True)
class _Roles:
    policy: ActorGroup
    engines: list[RolloutGroup]
    process_s: float
    engine_s: float
    memory: ProcessMemory


@contextmanager
def _roles(gpus: int, threads: int, models: Sequence[Path]) -> Iterator[_Roles]:
    """A policy without a model yet, and an engine of each model, started at the same time; on the same device where
    there is one only."""
    beside = gpus == 1
    own = RolloutPlacement(engines=len(models), cpus=0, gpus=1 if gpus else 0, threads=threads)
    places = {
        "policy": Placed(RolePlacement(cpus=0, gpus=1 if gpus else 0, threads=threads), 1),
        "rollout": Placed(RolloutPlacement(colocate="policy") if beside else own, 1),
    }
    seating = Seating(places, _TIMEOUT_S, autoscaling=False)
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
        loading = [
            actor.load_model.remote(RolloutSetup(str(model), settings, _DTYPE, 1, seed=0, beside_policy=beside))
            for actor, model in zip(engines.actors, models, strict=True)
        ]
        join_collectives([policy], Timeouts(setup_s=_TIMEOUT_S))
        process_s = time.perf_counter() - began
        _wait(loading, "rollout: load_model")
        engine_s = time.perf_counter() - began
        groups = [RolloutGroup([actor], rollout, deterministic=False, timeout_s=_TIMEOUT_S) for actor in engines.actors]
        weights = read_shape(str(models[0])).parameters * BYTES[_DTYPE]
        memory = ProcessMemory(
            rank_mib=_one(policy, "memory") / MIB, engine_mib=max(0.0, _one(groups[0], "memory") - weights) / MIB
        )
        yield _Roles(policy, groups, process_s, engine_s, memory)
        _wait(engines.call("shutdown"), "rollout: shutdown")
    finally:
        for group in started:
            group.kill()
        seating.release()


def _identity(rank: int) -> dict[str, Any]:
    return {"role": "policy", "rank": rank, "world_size": 1, "seed": 0, "deterministic": False}


def _policy(model: Path, sizes: Sizes) -> Policy:
    tokens = max(samples.count * (samples.prompt + samples.response) for samples in sizes.passes)
    return Policy(model=str(model), engine=TrainingEngine(zero_stage=2, dtype=_DTYPE, micro_batch_tokens=tokens))


def _collectives(sizes: Sizes, on_gpus: int) -> CollectiveSeconds:
    """Between two processes, each with its own device or its half of the cores."""
    logger.info("measuring collectives")
    threads = max(1, cores() // 2)
    placement = RolePlacement(ranks=2, cpus=0, gpus=1 if on_gpus else 0, threads=threads)
    seating = Seating({"pair": Placed(placement, 1)}, _TIMEOUT_S, autoscaling=False)
    pair = None
    try:
        pair = create_group("pair", PairWorker, seating.seats["pair"], 2, lambda rank: {"rank": rank})
        host, port = _one(pair, "address")
        _wait(pair.call("join", host, port, _TIMEOUT_S), "pair: join")
        found = _wait(pair.call("time_collectives", sizes.collective, 5), "pair: time_collectives")
        return CollectiveSeconds(sizes.collective, {name: max(f[name] for f in found) for name in found[0]})
    finally:
        if pair is not None:
            pair.kill()
        seating.release()


def _ray_rates(policy: ActorGroup, sizes: Sizes) -> RayRates:
    _one(policy, "nothing")
    began = time.perf_counter()
    _wait([ref for _ in range(_CALLS) for ref in policy.call("nothing")], "policy: nothing")
    call_s = (time.perf_counter() - began) / _CALLS
    data = np.zeros(sizes.stored, np.uint8)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        _one(policy, "length", [ray.put(data)])
        seconds.append(time.perf_counter() - began)
    return RayRates(call_s=call_s, object_store_gb_s=sizes.stored / median(seconds) / GB)


def _passes(policy: ActorGroup, shape: ModelShape, sizes: Sizes) -> list[PassSeconds]:
    points = []
    for samples in sizes.passes:
        found: PassTimes = _one(policy, "time_passes", samples, shape.vocab, _REPEATS)
        sequences = Sequences.of(samples.count, samples.prompt, samples.response)
        points.append(PassSeconds(shape, sequences, found.scoring, found.training, found.step))
    return points


def _decoding(engine: RolloutGroup, shape: ModelShape, sizes: Sizes) -> list[DecodeSeconds]:
    _generate_s(engine, shape, Decoding(4, 16), sizes.short)  # the warm-up
    points = []
    for batch in sizes.decoding:
        rows = [tuple(_generate_s(engine, shape, batch, n) for n in (sizes.short, sizes.long)) for _ in range(_REPEATS)]
        short_s, long_s = (median(column) for column in zip(*rows, strict=True))
        points.append(DecodeSeconds(shape, batch.sequences, batch.prompt, sizes.short, sizes.long, short_s, long_s))
    return points


def _generate_s(engine: RolloutGroup, shape: ModelShape, batch: Decoding, length: int) -> float:
    random = np.random.default_rng(batch.sequences)
    shard = [
        PromptRequest(f"random-{number}", 0, number, random.integers(0, shape.vocab, batch.prompt).tolist())
        for number in range(batch.sequences)
    ]
    sampling = Sampling(max_new_tokens=length, ignore_eos=True)
    began = time.perf_counter()
    for _ in engine.generate([shard], 0, sampling):
        pass
    return time.perf_counter() - began


def _pause_s(engine: RolloutGroup) -> float:
    def pause() -> None:
        engine.run("hold", timeout_s=_TIMEOUT_S, setting=_SETTING)
        engine.run("release", 0, _TIMEOUT_S, timeout_s=_TIMEOUT_S, setting=_SETTING)

    return median(_seconds(pause) for _ in range(5))


def _sync_s(policy: ActorGroup, engine: RolloutGroup) -> float:
    host, port = _one(policy, "address")
    _one(policy, "connect", engine.actors, 1, host, port, _BUCKET_MIB * MIB, _TIMEOUT_S)
    laps = [_seconds(lambda version=version: _one(policy, "send_weights", version)) for version in range(1, 5)]
    return median(laps[1:])


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _one(group: ActorGroup, method: str, *args: Any) -> Any:
    """What rank 0 answers."""
    return _wait([group.call_one(0, method, *args)], f"{group.role}: {method}")[0]


def _wait(refs: Sequence[ray.ObjectRef], what: str) -> list[Any]:
    return wait_all(refs, _TIMEOUT_S, what, _SETTING)
