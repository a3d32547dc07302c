"""How fast one process computes, and how fast it reaches the others."""

from dataclasses import dataclass

from rlhf_ray.config.training import Dtype
from rlhf_ray.planner.calibration import Calibration, Collectives
from rlhf_ray.planner.devices import DEVICES, GB
from rlhf_ray.planner.hardware import Machine


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
class Group:
    """The ranks of a role as they talk to one another, in a ring that enters and leaves each node once.

    Attributes:
        ranks: how many.
        nodes: that they sit on.
        disk: bytes a second of its part of the node's local disk.
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
