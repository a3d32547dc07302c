"""What a machine gives of its peaks: the constants of the time model.

Most are factors on an ideal time, as operations take at the device's peak and bytes at its bandwidth: 1 is the ideal, 2
takes twice as long. The others are seconds that come on top, whatever the size. `rlhf-ray calibrate` measures them once
for a machine; they are never fitted to a job. What a file does not have is taken from the defaults of its device.
"""

import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import model_validator

from rlhf_ray.config.base import NonNegativeFloat, PositiveFloat, PositiveInt, Section
from rlhf_ray.config.loading import ConfigError, load_section

MIB = 2**20


Device = Literal["cpu", "gpu"]
_HEADER = "# Written by `rlhf-ray calibrate`, read by `rlhf-ray plan`. docs/planner.md says what each number means.\n"


class ProcessMemory(Section):
    """What processes take beside their model; `rlhf-ray calibrate` measures those on the host."""

    rank_mib: NonNegativeFloat = 650.0
    """Host memory of a rank that trains or scores."""
    trainer_mib: NonNegativeFloat = 150.0
    """Host memory that a rank that trains on the CPU takes more: what DeepSpeed and the allocator keep."""
    sender_mib: NonNegativeFloat = 250.0
    """Host memory that a rank of the policy takes more, which has imported vLLM to send weights."""
    engine_mib: NonNegativeFloat = 1500.0
    """Host memory of a rollout engine with one worker, all its processes together."""
    worker_mib: NonNegativeFloat = 650.0
    """Host memory of every further worker of an engine, and of a worker of a reward function or service."""
    controller_mib: NonNegativeFloat = 900.0
    """Host memory of the process that runs the job."""
    node_mib: NonNegativeFloat = 600.0
    """Host memory of Ray's own processes on a node."""
    context_mib: NonNegativeFloat = 1000.0
    """Device memory of a process on a GPU: CUDA, its kernels, NCCL's buffers."""
    graphs_mib: NonNegativeFloat = 1000.0
    """Device memory of an engine's CUDA graphs, beside its share of the device."""
    on_gpu_mib: NonNegativeFloat = 1500.0
    """Host memory that a process takes more when it drives a GPU."""

    def bytes_of(self, name: str) -> int:
        """A field in bytes."""
        return int(getattr(self, name) * MIB)


class DeviceRates(Section):
    """What one device attains: a GPU, or one core of a CPU with all of its node at work."""

    bfloat16_tflops: PositiveFloat
    """Matrix products in bfloat16, in 10¹² operations a second."""
    float32_tflops: PositiveFloat
    """Matrix products in float32."""
    memory_gb_s: PositiveFloat
    """Bandwidth of its memory, in 10⁹ bytes a second: copies, bytes that are read and bytes that are written."""
    link_gb_s: PositiveFloat | None = None
    """Broadcasts from one process to another on the same node, in 10⁹ bytes a second. None takes the device's own,
    where there was no second device to measure with."""


class Pass(Section):
    """What a transformer does with one micro-batch."""

    products: NonNegativeFloat
    """Products of weights and states: time ÷ time at the peak."""
    attention: NonNegativeFloat
    """Products of queries, keys and values, likewise; only the half below the diagonal is counted."""
    elementwise: NonNegativeFloat
    """Norms, activations, residuals, rotations: time ÷ time of their reads and writes at the memory's bandwidth."""
    vocabulary: NonNegativeFloat
    """Softmax over the vocabulary: the same for the logits in float32; its products count as `products`."""
    weights: NonNegativeFloat
    """Reading weights and writing gradients, once for each: time ÷ time of these bytes at the memory's bandwidth."""
    layer_s: NonNegativeFloat
    """Seconds of each layer that don't depend on its size. A GPU computes meanwhile, a CPU does not."""


class OptimizerRates(Section):
    """AdamW."""

    traffic: NonNegativeFloat
    """Time ÷ time in which memory moves what the step reads and writes: gradients, master weights, moments."""
    step_s: NonNegativeFloat
    """Seconds of each step that don't depend on the size of the model."""


class Generation(Section):
    """A vLLM engine."""

    weights: NonNegativeFloat
    """Reading all weights, once for each token of a sequence: time ÷ time at the memory's bandwidth."""
    products: NonNegativeFloat
    """Products of weights and states, in place of that where they take longer: time ÷ time at the peak."""
    cache: NonNegativeFloat
    """Reading cached keys and values: time ÷ time at the memory's bandwidth."""
    vocabulary: NonNegativeFloat
    """Sampling: time ÷ time in which memory moves the logits in float32."""
    prompt: NonNegativeFloat
    """Prompts: time ÷ time of their products at the peak."""
    sequence_s: NonNegativeFloat
    """Seconds for each sequence of a step: its sampling, and what is kept of it."""
    layer_s: NonNegativeFloat
    """Seconds for each layer of a step."""
    step_s: NonNegativeFloat
    """Seconds of a step that depend on nothing: its scheduling."""


class Collectives(Section):
    """Collectives between the ranks of a role: time ÷ time of the bytes that each rank must send at the bandwidth."""

    all_reduce: NonNegativeFloat
    """Sum, of which every rank gets all."""
    all_gather: NonNegativeFloat
    """Parts that every rank gets all of."""
    reduce_scatter: NonNegativeFloat
    """Sum, of which every rank gets its part."""
    call_s: NonNegativeFloat
    """Seconds of a call without bytes."""


class WeightSyncRates(Section):
    """New weights on their way to the engines."""

    weights: NonNegativeFloat
    """Time of the bytes ÷ their time at the bandwidth between the devices, loading included."""
    tensor_s: NonNegativeFloat
    """Seconds for each weight."""
    sync_s: NonNegativeFloat
    """Seconds of a sync that depend on nothing: engines pause and go on."""


class RayRates(Section):
    """Calls and data between actors."""

    call_s: NonNegativeFloat
    """Seconds of a call that does nothing."""
    object_store_gb_s: PositiveFloat
    """Objects put into the store and fetched by another process of the node, in 10⁹ bytes a second."""


class Start(Section):
    """What passes before the first step."""

    process_s: NonNegativeFloat
    """Seconds until a rank is up, its libraries imported."""
    engine_s: NonNegativeFloat
    """Seconds until a vLLM engine of a small model answers."""
    load_gb_s: PositiveFloat
    """Weights read from files that are in the system's cache, in 10⁹ bytes a second."""


class Calibration(Section):
    """What the time model takes as given of a kind of device."""

    device: Device
    """What it holds for."""
    machine: str = ""
    """Where it was measured; empty for the defaults."""
    threads: PositiveInt | None = None
    """Threads that a process had in the measurements on a CPU."""
    measured: tuple[str, ...] = ()
    """Sections that were measured. The others are defaults."""
    rates: DeviceRates | None = None
    """What one device attains; None takes the peaks of the data sheet."""
    scoring: Pass
    """Forward passes from which nothing is learnt."""
    training: Pass
    """Forward and backward passes together."""
    optimizer: OptimizerRates
    """Optimizer steps."""
    generation: Generation
    """Rollout engines."""
    collectives: Collectives
    """Between the ranks of a role."""
    weight_sync: WeightSyncRates
    """From the policy to the engines."""
    ray: RayRates
    """Between actors."""
    start: Start
    """Before the first step."""
    memory: ProcessMemory = ProcessMemory()
    """Of processes, beside their models."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: object) -> object:
        """Sections that a file leaves out are the device's defaults."""
        if not isinstance(given, dict) or given.get("device") not in ("cpu", "gpu"):
            return given
        return {**_default_sections(given["device"]), **given}

    @model_validator(mode="after")
    def _measured_are_sections(self) -> Self:
        known = [name for name in type(self).model_fields if name not in ("device", "machine", "threads", "measured")]
        for name in self.measured:
            if name not in known:
                raise ValueError(f"measured: {name!r} is no section; known: {', '.join(known)}")
        if "rates" in self.measured and self.rates is None:
            raise ValueError("measured names rates, but rates is missing")
        return self


@cache
def defaults(device: Device) -> Calibration:
    """What is assumed where nothing was measured."""
    return Calibration.model_validate({"device": device})


@cache
def _default_sections(device: Device) -> dict[str, Any]:
    path = files("rlhf_ray.planner") / "calibrations" / f"{device}.yaml"
    sections: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return sections


def default_place() -> Path:
    """Where `calibrate` writes and `plan` looks: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "rlhf_ray" / "calibration.yaml"


def constants(path: Path | None, here: str | None) -> dict[Device, Calibration]:
    """Of both kinds of devices: what was measured, where it was, else defaults.

    Args:
        path: of a file; None looks at the default place.
        here: what this machine computes with, when the plan is for it. A file at the default place counts for the
            machine alone that it was measured on.

    Raises:
        ConfigError: when the file can't be used.
    """
    found: dict[Device, Calibration] = {"cpu": defaults("cpu"), "gpu": defaults("gpu")}
    if path is not None:
        measured = load_calibration(path)
    elif here is not None and default_place().is_file():
        try:
            measured = load_calibration(default_place())
        except ConfigError as error:  # of another version, perhaps
            *others, last = error.problems
            raise ConfigError(error.source, [*others, f"{last}; `rlhf-ray calibrate` writes the file anew"]) from None
        if measured.machine != here:
            return found
    else:
        return found
    return found | {measured.device: measured}


def load_calibration(path: Path) -> Calibration:
    """Read a file that `calibrate` wrote, or that somebody wrote by hand.

    Raises:
        ConfigError: with every problem found, each naming its dotted path.
    """
    return load_section(path, Calibration)


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write a file, whole or not at all, with numbers of three digits and what each means."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(_HEADER + _yaml(calibration), encoding="utf-8")
    partial.replace(path)


def _yaml(calibration: Calibration) -> str:
    def rounded(value: object) -> object:
        if isinstance(value, dict):
            return {key: rounded(inner) for key, inner in value.items()}
        return float(f"{value:.3g}") if isinstance(value, float) else value

    raw = rounded(calibration.model_dump(mode="json", exclude_none=True))
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
