"""Measures what this machine gives, with the actors that a job has: `rlhf-ray calibrate`.

Random models of a few shapes go through the policy's passes, its optimizer, the engines and a weight sync. Each
measurement has the machine for itself; only the starts overlap, as they do in a job. Passes count with their mean, as a
job has them; of the others the fastest repetition counts, which was disturbed least.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray

from rlhf_ray.actors.group import wait_together
from rlhf_ray.actors.probe import PairWorker, ProbeGroup, ProbeWorker, Samples
from rlhf_ray.actors.rollout import RolloutGroup
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config.placement import Cluster
from rlhf_ray.config.rollout import Sampling
from rlhf_ray.config.training import Dtype, Policy, TrainingEngine
from rlhf_ray.controllers.probed_roles import DTYPE, LIMIT, TIMEOUTS, probed_pair, probed_roles
from rlhf_ray.data.requests import PromptRequest
from rlhf_ray.models.config_json import read_shape
from rlhf_ray.models.random_llama import LlamaSize, write_random_llama
from rlhf_ray.models.shapes import ModelShape
from rlhf_ray.planner.calibration import Calibration, Device, RayRates, Start
from rlhf_ray.planner.devices import GB
from rlhf_ray.planner.measurements import (
    MIB,
    CollectiveSeconds,
    DecodeSeconds,
    Measurements,
    PassSeconds,
    SyncSeconds,
    calibration_of,
)
from rlhf_ray.planner.pass_time import STATE_BYTES
from rlhf_ray.planner.work import BYTES, Sequences
from rlhf_ray.platform import cores, device_names, machine_name

logger = logging.getLogger("rlhf_ray")

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
        models: tiny but for its vocabulary, narrow and deep, wide and flat.
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
        models=(LlamaSize(256, 2, 704, 49152), LlamaSize(512, 10, 1408, 8192), LlamaSize(1024, 3, 2816, 24576)),
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
        RoleTimeout, ActorDied, TaskFailed: as `wait_all`.
    """
    devices = device_names()
    device: Device = "gpu" if devices else "cpu"
    sizes = sizes or SIZES[device]
    with TemporaryDirectory(prefix="rlhf-ray-calibrate-") as folder, ray_session(Cluster(address="local"), "calibrate"):
        logger.info("writing random models")
        models = [write_random_llama(Path(folder) / str(n), size) for n, size in enumerate(sizes.models)]
        collectives = _collectives(sizes, on_gpus=bool(devices)) if len(devices) != 1 else None
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
    with probed_roles(len(devices), threads, engine_models) as roles:
        policy = roles.policy
        logger.info("measuring peaks")
        flops: dict[Dtype, float] = {
            "bfloat16": policy.call(ProbeWorker.peak_flops, "bfloat16", sizes.product).wait(LIMIT)[0],
            "float32": policy.call(ProbeWorker.peak_flops, "float32", sizes.product).wait(LIMIT)[0],
        }
        [memory] = policy.call(ProbeWorker.memory_bandwidth, sizes.copy).wait(LIMIT)
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
        memory_of = roles.memory
        for model, shape in zip(models, shapes, strict=True):
            logger.info("measuring passes of %.0f million weights", shape.parameters / 1e6)
            [loaded] = policy.call(ProbeWorker.replace_model, _policy(model, sizes)).wait(LIMIT)
            loads.append(shape.parameters * BYTES[DTYPE] / loaded / GB)
            passes += _passes(policy, shape, sizes)
            # By the smallest model; a GPU keeps what training leaves in its own memory.
            tells_memory = device == "cpu" and model == models[0]
            if tells_memory:
                trained = _mib_beside_model(policy, shape)
                memory_of = memory_of.model_copy(update={"trainer_mib": max(0.0, trained - memory_of.rank_mib)})
            if model in engine_models and len(devices) != 1:  # on its own device a sync is of another kind
                engine = roles.engines[engine_models.index(model)]
                syncs.append(SyncSeconds(shape, _sync_s(policy, engine)))
            if tells_memory:
                sent = _mib_beside_model(policy, shape)
                memory_of = memory_of.model_copy(update={"sender_mib": max(0.0, sent - trained)})
        return Measurements(
            device=device,
            machine=machine_name(),
            threads=None if devices else threads,
            dtype=DTYPE,
            flops=flops,
            memory=memory,
            passes=passes,
            decoding=decoding,
            syncs=syncs,
            pause_s=pause_s,
            collectives=collectives,
            ray=ray_rates,
            start=Start(process_s=roles.process_s, engine_s=roles.engine_s, load_gb_s=max(loads)),
            memory_of=memory_of,
        )


def _mib_beside_model(policy: ProbeGroup, shape: ModelShape) -> float:
    states = (BYTES[DTYPE] + STATE_BYTES) * shape.parameters
    return (policy.call(ProbeWorker.memory).wait(LIMIT)[0] - states) / MIB


def _policy(model: Path, sizes: Sizes) -> Policy:
    tokens = max(samples.count * (samples.prompt + samples.response) for samples in sizes.passes)
    return Policy(model=str(model), engine=TrainingEngine(zero_stage=2, dtype=DTYPE, micro_batch_tokens=tokens))


def _collectives(sizes: Sizes, on_gpus: bool) -> CollectiveSeconds:
    logger.info("measuring collectives")
    with probed_pair(on_gpus) as pair:
        found = pair.call(PairWorker.time_collectives, sizes.collective, 5).wait(LIMIT)
    return CollectiveSeconds(sizes.collective, {name: max(each[name] for each in found) for name in found[0]})


def _ray_rates(policy: ProbeGroup, sizes: Sizes) -> RayRates:
    policy.call(ProbeWorker.nothing).wait(LIMIT)
    began = time.perf_counter()
    wait_together([policy.call(ProbeWorker.nothing) for _ in range(_CALLS)], LIMIT, "policy: nothing")
    call_s = (time.perf_counter() - began) / _CALLS
    data = np.zeros(sizes.stored, np.uint8)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        policy.call(ProbeWorker.length, [ray.put(data)]).wait(LIMIT)
        seconds.append(time.perf_counter() - began)
    return RayRates(call_s=call_s, object_store_gb_s=sizes.stored / min(seconds) / GB)


def _passes(policy: ProbeGroup, shape: ModelShape, sizes: Sizes) -> list[PassSeconds]:
    points = []
    for samples in sizes.passes:
        [found] = policy.call(ProbeWorker.time_passes, samples, shape.vocab, _REPEATS).wait(LIMIT)
        sequences = Sequences.of(samples.count, samples.prompt, samples.response)
        points.append(PassSeconds(shape, sequences, found.scoring, found.training, found.step))
    return points


def _decoding(engine: RolloutGroup, shape: ModelShape, sizes: Sizes) -> list[DecodeSeconds]:
    _generate_s(engine, shape, Decoding(4, 16), sizes.short)  # the warm-up
    points = []
    for batch in sizes.decoding:
        rows = [tuple(_generate_s(engine, shape, batch, n) for n in (sizes.short, sizes.long)) for _ in range(_REPEATS)]
        short_s, long_s = (min(column) for column in zip(*rows, strict=True))
        points.append(DecodeSeconds(shape, batch.sequences, batch.prompt, sizes.short, sizes.long, short_s, long_s))
    return points


def _generate_s(engine: RolloutGroup, shape: ModelShape, batch: Decoding, length: int) -> float:
    random = np.random.default_rng(batch.sequences)
    shard = [
        PromptRequest(f"random-{number}", 0, number, random.integers(0, shape.vocab, batch.prompt, np.int32))
        for number in range(batch.sequences)
    ]
    sampling = Sampling(max_new_tokens=length, ignore_eos=True)
    began = time.perf_counter()
    for _ in engine.generate([shard], 0, sampling):
        pass
    return time.perf_counter() - began


def _pause_s(engine: RolloutGroup) -> float:
    def pause() -> None:
        engine.hold().wait(LIMIT)
        engine.release([0]).wait(LIMIT)

    return min(_seconds(pause) for _ in range(5))


def _sync_s(policy: ProbeGroup, engine: RolloutGroup) -> float:
    policy.connect(engine.actors, 1, _BUCKET_MIB * MIB, TIMEOUTS, same_devices=False).wait(LIMIT)

    def send(version: int) -> None:
        policy.send_weights(version).wait(LIMIT)

    laps = [_seconds(partial(send, version)) for version in range(1, 5)]
    return min(laps[1:])


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
