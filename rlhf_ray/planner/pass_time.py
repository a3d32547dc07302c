"""Seconds of what a rank of a training or scoring role does: forward passes, updates, and the collectives between."""

import math
from dataclasses import dataclass

from rlhf_ray.config.training import Dtype, Lora, ScoringEngine, TrainingEngine
from rlhf_ray.models.shapes import ModelShape
from rlhf_ray.planner.calibration import Calibration, Collectives, Pass
from rlhf_ray.planner.devices import DEVICES, GB
from rlhf_ray.planner.hardware import Machine
from rlhf_ray.planner.work import (
    BYTES,
    REDUCE_BUCKET,
    Sequences,
    Work,
    adapter_parameters,
    gathered_tensors,
    layers_work,
    scoring_work,
    training_work,
)

# Bytes that a step of AdamW moves for each weight: gradient, its norm and clipping, master weight, two moments, and in
# bfloat16 the weight itself.
STEP_TRAFFIC = {"bfloat16": 50, "float32": 40}
STATE_BYTES = 12  # of a weight: float32 master, two moments


@dataclass(frozen=True)
class Rates:
    """One process with its device, or with some cores.

    Attributes:
        bfloat16, float32: operations a second.
        memory: bytes a second of its memory.
        host: bytes a second between the device and host memory.
        host_memory: bytes a second of this process's share of host memory.
        disk: bytes a second of its part of the node's local disk.
        link, network: bytes a second to a process on the same node, and from the node to other nodes.
        ahead: it computes while the next layers are being prepared, as a GPU does.
    """

    bfloat16: float
    float32: float
    memory: float
    host: float
    host_memory: float
    disk: float
    link: float
    network: float
    ahead: bool

    def flops(self, dtype: Dtype) -> float:
        """Operations a second at the peak."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32


def rates_of(machine: Machine, calibration: Calibration, threads: int) -> Rates:
    """A process on one device of a machine, or with `threads` cores of one without devices.

    What a calibration measured counts for its kind of device in place of the data sheet.
    """
    kind, measured = machine.kind, calibration.rates
    cores = threads if kind.is_cpu else 1
    core = DEVICES["CPU"].memory_gb_s * GB
    if kind.is_cpu and measured is not None:
        core = measured.memory_gb_s * GB
    link = machine.link if measured is None or measured.link_gb_s is None else measured.link_gb_s * GB
    return Rates(
        bfloat16=cores * (measured.bfloat16_tflops if measured else kind.bfloat16_tflops) * 1e12,
        float32=cores * (measured.float32_tflops if measured else kind.float32_tflops) * 1e12,
        memory=cores * (measured.memory_gb_s if measured else kind.memory_gb_s) * GB,
        host=kind.host_gb_s * GB,
        host_memory=core * (cores if kind.is_cpu else machine.cpus / max(1, machine.devices)),
        disk=machine.disk / max(1, machine.devices),
        link=link,
        network=machine.network,
        ahead=not kind.is_cpu,
    )


@dataclass(frozen=True)
class ProcessGroup:
    """The ranks of a role as they talk to one another, in a ring that enters and leaves each node once.

    Attributes:
        ranks: how many.
        nodes: that they sit on.
        link, network: bytes a second of a rank to one on its node, and from a node to others.
    """

    ranks: int
    nodes: int
    link: float
    network: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second around the ring."""
        return self.link if self.nodes == 1 else min(self.link, self.network)

    def all_reduce_s(self, size: float, factors: Collectives, calls: int = 1) -> float:
        """Seconds of a sum over the ranks that all of them get; each sends twice its size but for its own part."""
        return self._seconds(2 * size, factors.all_reduce, factors, calls)

    def all_gather_s(self, size: float, factors: Collectives, calls: int = 1) -> float:
        """Seconds until all ranks have all of `size` bytes, of which each has its part."""
        return self._seconds(size, factors.all_gather, factors, calls)

    def reduce_scatter_s(self, size: float, factors: Collectives, calls: int = 1) -> float:
        """Seconds of a sum over the ranks, of which each gets its part."""
        return self._seconds(size, factors.reduce_scatter, factors, calls)

    def _seconds(self, size: float, factor: float, factors: Collectives, calls: int) -> float:
        if self.ranks == 1:
            return 0.0
        return factor * size * (self.ranks - 1) / self.ranks / self.bandwidth + calls * factors.call_s


def ideal_times(work: Work, rates: Rates, dtype: Dtype, passes: int, layers: int) -> dict[str, float]:
    """By the name of its factor, what each part of some passes takes at the device's peaks; for `layer_s`, the number
    of layers that are run."""
    peak = rates.flops(dtype)
    # A CPU computes in float32 and takes as long for a number in either format.
    number = BYTES[dtype] if rates.ahead else BYTES["bfloat16"]
    return {
        "products": work.products / peak,
        "attention": work.attention / peak,
        "elementwise": number * work.elementwise / rates.memory,
        "vocabulary": work.logits / rates.memory,
        "weights": passes * number * work.weights / rates.memory,
        "layer_s": float(passes * layers),
    }


@dataclass(frozen=True)
class Ranks:
    """A role's model on its ranks, each with a share of the samples.

    Attributes:
        shape: of the model.
        engine: how it is held; a `TrainingEngine` for roles that learn.
        rates: of one rank.
        group: all ranks.
        constants: of their kind of device.
        lora: adapters beside frozen weights.
    """

    shape: ModelShape
    engine: TrainingEngine | ScoringEngine
    rates: Rates
    group: ProcessGroup
    constants: Calibration
    lora: Lora | None = None

    @property
    def trained(self) -> int:
        """Weights that learn."""
        return self.shape.parameters if self.lora is None else adapter_parameters(self.shape, self.lora)

    @property
    def weight_bytes(self) -> float:
        """Of all weights."""
        return self.shape.parameters * BYTES[self.engine.dtype]

    @property
    def held_bytes(self) -> float:
        """Of weights on one device."""
        if self.engine.offload_parameters != "none":
            return 0.0
        return self.weight_bytes / (self.group.ranks if self.engine.zero_stage == 3 else 1)

    @property
    def optimizer_bytes(self) -> float:
        """Of optimizer state on one device."""
        if not isinstance(self.engine, TrainingEngine) or self.engine.offload_optimizer != "none":
            return 0.0
        return STATE_BYTES * self.trained / (self.group.ranks if self.engine.zero_stage else 1)

    def scoring_s(self, sequences: Sequences) -> float:
        """Seconds of the forward passes over some sequences, shared out over the ranks."""
        share, passes = self._of_busiest_rank(sequences)
        work = scoring_work(self.shape, share)
        compute = self._seconds(work, self.constants.scoring, passes) + self._exchanging_s(share, passes)
        return self._with_gathering(compute, passes, gathers=1)

    def accumulate_s(self, sequences: Sequences) -> float:
        """Seconds of the forward and backward passes of one optimizer step, without the step."""
        assert isinstance(self.engine, TrainingEngine)
        share, passes = self._of_busiest_rank(sequences)
        constants = self.constants
        compute = self._seconds(training_work(self.shape, share, self.trained), constants.training, passes)
        exchanges = 2
        if self.engine.activation_checkpointing:
            exchanges = 3
            compute += self._seconds(layers_work(self.shape, share), constants.scoring, passes)
        compute += exchanges * self._exchanging_s(share, passes)
        return self._with_gathering(compute, passes, gathers=2) + self._reducing_s(passes)

    def step_s(self) -> float:
        """Seconds of an optimizer step when gradients are there, and until all ranks have the new weights."""
        assert isinstance(self.engine, TrainingEngine)
        engine, rates, factors = self.engine, self.rates, self.constants.optimizer
        own = self.trained / (self.group.ranks if engine.zero_stage else 1)
        traffic = own * STEP_TRAFFIC[engine.dtype]
        memory = rates.memory if engine.offload_optimizer == "none" else rates.host_memory
        seconds = factors.traffic * traffic / memory
        if engine.offload_optimizer != "none" and rates.ahead:
            seconds += 2 * own * BYTES[engine.dtype] / rates.host
        if engine.offload_optimizer == "nvme":  # read and written again
            seconds += 2 * own * STATE_BYTES / rates.disk
        if engine.zero_stage in (1, 2):
            size = self.trained * BYTES[engine.dtype]
            seconds += self.group.all_gather_s(size, self.constants.collectives, self._buckets)
        return seconds + factors.step_s

    def update_s(self, sequences: Sequences, optimizer_steps: int) -> float:
        """Seconds of one pass over some sequences in so many optimizer steps."""
        return optimizer_steps * (self.accumulate_s(sequences / optimizer_steps) + self.step_s())

    def _of_busiest_rank(self, sequences: Sequences) -> tuple[Sequences, int]:
        """What the busiest rank gets, and the number of its micro-batches. Of sequences that ranks share, each rank has
        a part of the tokens, and in attention of the heads."""
        sp_size = self.engine.sequence_parallel
        mine = max(1, math.ceil(sequences.count * sp_size / self.group.ranks - 1e-9))
        length = sequences.tokens / sequences.count
        together = max(1, int(self.engine.micro_batch_tokens / length))
        return sequences / (sequences.count / mine * sp_size), math.ceil(mine / together)

    def _seconds(self, work: Work, factors: Pass, passes: int) -> float:
        ideal = ideal_times(work, self.rates, self.engine.dtype, passes, self.shape.layers)
        terms: dict[str, float] = {name: getattr(factors, name) * seconds for name, seconds in ideal.items()}
        launches = terms.pop("layer_s")
        compute = sum(terms.values())
        return max(compute, launches) if self.rates.ahead else compute + launches

    def _exchanging_s(self, share: Sequences, passes: int) -> float:
        """Ranks that share sequences exchange queries, keys, values and results in each layer (Jacobs et al. 2023)."""
        sp_size, shape, factors = self.engine.sequence_parallel, self.shape, self.constants.collectives
        if sp_size == 1:
            return 0.0
        near = self.group.ranks // self.group.nodes >= sp_size
        bandwidth = self.group.link if near else self.group.bandwidth
        states = 2 * (shape.heads + shape.kv_heads) * shape.head_dim * BYTES[self.engine.dtype]
        moved = share.tokens * shape.layers * states * (sp_size - 1) / sp_size
        return factors.all_gather * moved / bandwidth + passes * shape.layers * 4 * factors.call_s

    def _with_gathering(self, compute: float, passes: int, gathers: int) -> float:
        """ZeRO-3 brings every layer's weights together in each pass, the next ones while a GPU computes."""
        if self.engine.zero_stage != 3:
            return compute
        size, own = passes * gathers * self.weight_bytes, self.weight_bytes / self.group.ranks
        calls = passes * gathers * gathered_tensors(self.shape)
        gathering = self.group.all_gather_s(size, self.constants.collectives, calls)
        if self.engine.offload_parameters != "none" and self.rates.ahead:
            gathering += passes * gathers * own / self.rates.host
        if self.engine.offload_parameters == "nvme":
            gathering += passes * gathers * own / self.rates.disk
        return max(compute, gathering) if self.rates.ahead else compute + gathering

    def _reducing_s(self, passes: int) -> float:
        """Gradients over the ranks: in stages 0 and 1 once for a step, in stages 2 and 3 in each pass. DeepSpeed's
        stages 1 and 2 sum all of them everywhere and keep a part."""
        assert isinstance(self.engine, TrainingEngine)
        stage, factors = self.engine.zero_stage, self.constants.collectives
        size = self.trained * BYTES[self.engine.dtype]
        if stage == 3:
            return self.group.reduce_scatter_s(passes * size, factors, passes * self._buckets)
        times = passes if stage == 2 else 1
        return self.group.all_reduce_s(times * size, factors, times * self._buckets)

    @property
    def _buckets(self) -> int:
        return math.ceil(self.trained / REDUCE_BUCKET)
