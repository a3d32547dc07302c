"""What `rlhf-ray calibrate` measures, and the factors that explain it best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.training import Dtype
from rlhf_ray.models.shapes import ModelShape
from rlhf_ray.planner.calibration import (
    Calibration,
    Collectives,
    Device,
    DeviceRates,
    Generation,
    OptimizerRates,
    Pass,
    ProcessMemory,
    RayRates,
    Start,
    WeightSyncRates,
    defaults,
)
from rlhf_ray.planner.decoding_time import DecodingEngine
from rlhf_ray.planner.devices import GB
from rlhf_ray.planner.pass_time import STEP_TRAFFIC, ProcessGroup, Rates, ideal_times
from rlhf_ray.planner.work import BYTES, Sequences, scoring_work, training_work

MIB = 2**20


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of the passes over one micro-batch.

    Attributes:
        scoring: forward, without gradients.
        training: forward and backward.
        step: the optimizer step after it.
    """

    shape: ModelShape
    sequences: Sequences
    scoring: float
    training: float
    step: float


@dataclass(frozen=True)
class DecodeSeconds:
    """Seconds of two batches that differ in the length of their responses alone.

    Attributes:
        sequences: at a time.
        prompt: tokens of each.
        short, long: tokens of each response.
        short_s, long_s: seconds of the batch.
    """

    shape: ModelShape
    sequences: int
    prompt: int
    short: int
    long: int
    short_s: float
    long_s: float

    @property
    def step_s(self) -> float:
        """Seconds of one token of each sequence."""
        return (self.long_s - self.short_s) / (self.long - self.short)

    @property
    def context(self) -> float:
        """Mean tokens before such a token."""
        return self.prompt + (self.short + self.long) / 2


@dataclass(frozen=True)
class SyncSeconds:
    """Seconds of a weight sync."""

    shape: ModelShape
    seconds: float


@dataclass(frozen=True)
class CollectiveSeconds:
    """Seconds of collectives between two ranks.

    Attributes:
        size: bytes of the whole, of which each rank has half where it is in parts.
        seconds: by operation: broadcast, all_reduce, all_gather, reduce_scatter, and `call` without bytes.
    """

    size: int
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Measurements:
    """All that was measured on a machine.

    Attributes:
        machine: in words.
        threads: of a process on a CPU; None for a GPU.
        dtype: of weights and computing.
        flops: operations a second, by number format.
        memory: bytes a second.
        pause_s: seconds in which an engine pauses and goes on.
        load_gb_s: of weights.
        collectives: None where there are no two devices.
    """

    device: Device
    machine: str
    threads: int | None
    dtype: Dtype
    flops: Mapping[Dtype, float]
    memory: float
    passes: Sequence[PassSeconds]
    decoding: Sequence[DecodeSeconds]
    syncs: Sequence[SyncSeconds]
    pause_s: float
    collectives: CollectiveSeconds | None
    ray: RayRates
    start: Start
    memory_of: ProcessMemory

    @property
    def rates(self) -> Rates:
        """Of the process that was measured."""
        link = self._link or 1.0
        return Rates(
            bfloat16=self.flops["bfloat16"],
            float32=self.flops["float32"],
            memory=self.memory,
            host=1.0,
            host_memory=self.memory,
            disk=1.0,
            link=link,
            network=link,
            ahead=self.device == "gpu",
        )

    @property
    def _link(self) -> float | None:
        found = self.collectives
        return None if found is None else found.size / found.seconds["broadcast"]


def calibration_of(found: Measurements) -> Calibration:
    """The factors that explain the measurements best. What could not be measured is left at its default."""
    assumed = defaults(found.device)
    cores, link = found.threads or 1, found._link
    measured = {
        "rates": DeviceRates(
            bfloat16_tflops=found.flops["bfloat16"] / cores / 1e12,
            float32_tflops=found.flops["float32"] / cores / 1e12,
            memory_gb_s=found.memory / cores / GB,
            link_gb_s=None if link is None else link / GB,
        ),
        "scoring": _pass(found, training=False),
        "training": _pass(found, training=True),
        "optimizer": _optimizer(found),
        "generation": _generation(found, assumed),
        "ray": found.ray,
        "start": found.start,
        "memory": found.memory_of,
    }
    if found.collectives is not None:
        measured["collectives"] = _collectives(found.collectives)
    if link is not None and found.syncs:
        measured["weight_sync"] = _weight_sync(found, link)
    return Calibration.model_validate(
        {
            **assumed.model_dump(),
            "machine": found.machine,
            "threads": found.threads,
            "measured": tuple(measured),
            **{name: section.model_dump() for name, section in measured.items()},
        }
    )


def _pass(found: Measurements, *, training: bool) -> Pass:
    ideal, seconds = [], []
    for point in found.passes:
        shape, sequences = point.shape, point.sequences
        work = training_work(shape, sequences, shape.parameters) if training else scoring_work(shape, sequences)
        ideal.append(ideal_times(work, found.rates, found.dtype, passes=1, layers=shape.layers))
        seconds.append(point.training if training else point.scoring)
    return Pass(**fit_factors(ideal, seconds))


def _optimizer(found: Measurements) -> OptimizerRates:
    traffic = [point.shape.parameters * STEP_TRAFFIC[found.dtype] / found.memory for point in found.passes]
    ideal = [{"traffic": seconds, "step_s": 1.0} for seconds in traffic]
    return OptimizerRates(**fit_factors(ideal, [point.step for point in found.passes]))


def _generation(found: Measurements, assumed: Calibration) -> Generation:
    """With one engine, as on a GPU, what a model's size and number of layers cost can't be told apart: what each layer,
    each step and the vocabulary take is assumed. There, weights are read while products are computed, and with batches
    as small as the measured ones reading takes longer; products are then assumed to be as good as those of prompts."""
    alone = ProcessGroup(1, 1, found.rates.link, found.rates.network)

    def engine(shape: ModelShape) -> DecodingEngine:
        return DecodingEngine(shape, found.dtype, 1, 1, found.rates, alone, assumed)

    steps = [engine(point.shape).ideal_step(point.sequences, point.context) for point in found.decoding]
    known = {name: getattr(assumed.generation, name) for name in ("vocabulary", "layer_s", "step_s")}
    if found.device == "gpu":
        known["products"] = 0.0
    one = len({point.shape for point in found.decoding}) == 1
    factors = fit_factors(steps, [point.step_s for point in found.decoding], known if one else None)
    prompts = [
        (point.short_s - point.short * point.step_s)
        / engine(point.shape).ideal_prompt_s(point.sequences * point.prompt)
        for point in found.decoding
        if point.prompt > point.long
    ]
    prompt = max(0.0, mean(prompts))
    if found.device == "gpu":
        factors["products"] = prompt
    return Generation(**factors, prompt=prompt)


def _collectives(found: CollectiveSeconds) -> Collectives:
    """Each of two ranks sends as much as the size in a sum that both get, else half of it."""
    seconds, broadcast = found.seconds, found.seconds["broadcast"]

    def factor(name: str, share: float) -> float:
        return max(0.0, seconds[name] - seconds["call"]) / (share * broadcast)

    return Collectives(
        all_reduce=factor("all_reduce", 1.0),
        all_gather=factor("all_gather", 0.5),
        reduce_scatter=factor("reduce_scatter", 0.5),
        call_s=seconds["call"],
    )


def _weight_sync(found: Measurements, link: float) -> WeightSyncRates:
    ideal = [
        {
            "weights": point.shape.parameters * BYTES[found.dtype] / link,
            "tensor_s": float(sum(tensor.count for tensor in point.shape.tensors())),
        }
        for point in found.syncs
    ]
    beyond = [max(1e-3, point.seconds - found.pause_s) for point in found.syncs]
    return WeightSyncRates(**fit_factors(ideal, beyond), sync_s=found.pause_s)


def fit_factors(
    ideal: Sequence[Mapping[str, float]], seconds: Sequence[float], known: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Factors `f` with `seconds ≈ Σ f[name] · ideal[name]`, none of them negative.

    The sum of squared relative errors is the least that there is. Terms that are too alike in all measurements to be
    told apart share what they explain, as chance has it; predictions for similar work are right all the same.

    Args:
        ideal: of each measurement, the same names in all of them.
        seconds: that each measurement took, positive.
        known: factors that are not to be found.
    """
    known = known or {}
    names = [name for name in ideal[0] if name not in known]
    taken = np.asarray(seconds)
    terms = np.array([[row[name] for name in names] for row in ideal]) / taken[:, None]
    wanted = 1 - np.array([sum(known[name] * row[name] for name in known) for row in ideal]) / taken
    scale = np.abs(terms).max(axis=0)
    used = [column for column in range(len(names)) if scale[column] > 0]
    found = np.zeros(len(names))
    found[used] = _nonnegative(terms[:, used] / scale[used], wanted) / scale[used]
    return {**dict(zip(names, found.tolist(), strict=True)), **known}


def _nonnegative(terms: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares over all sets of columns; the best solution without a negative entry is the best at all, because
    the problem is convex. There are few columns."""
    columns = range(terms.shape[1])
    best, least = np.zeros(terms.shape[1]), float(wanted @ wanted)
    for size in range(1, min(terms.shape) + 1):
        for chosen in combinations(columns, size):
            solution, *_ = np.linalg.lstsq(terms[:, chosen], wanted, rcond=None)
            if (solution < 0).any():
                continue
            missed = terms[:, chosen] @ solution - wanted
            if (error := float(missed @ missed)) < least * (1 - 1e-9):
                best, least = np.zeros(terms.shape[1]), error
                best[list(chosen)] = solution
    return best
