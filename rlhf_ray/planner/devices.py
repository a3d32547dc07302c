"""Kinds of devices: how much memory they have, and how fast they can be at best.

Peaks are of dense products without sparsity, as NVIDIA's data sheets give them (H100, H200, A100, B200: SXM modules).
float32 is the rate without TF32, which torch leaves off. Memory is what the CUDA runtime reports to a process, rounded
down: a little less than the nominal size, for driver and error correction.
"""

from pydantic import Field

from rlhf_ray.config.base import PositiveFloat, Section
from rlhf_ray.config.training import Dtype

GIB = 2**30
GB = 10**9


class DeviceKind(Section):
    """A kind of device, in a cluster file an entry of `devices`."""

    memory_gib: PositiveFloat
    """Memory that a process finds on it."""
    bfloat16_tflops: PositiveFloat
    """Peak of matrix products in bfloat16, in 10¹² operations a second."""
    float32_tflops: PositiveFloat
    """Peak of matrix products in float32."""
    memory_gb_s: PositiveFloat
    """Bandwidth of its memory, in 10⁹ bytes a second."""
    link_gb_s: PositiveFloat
    """Bandwidth to the other devices of a node, in one direction: half of what data sheets call NVLink bandwidth."""
    host_gb_s: PositiveFloat = 25.0
    """Bandwidth to host memory, in one direction: what PCIe gives in practice."""
    is_cpu: bool = Field(default=False, exclude=True)
    """Whether this is one core of a CPU. A process computes with as many of these cores as it has threads, in the host
    memory of its node, so `memory_gib` is not used."""

    def flops(self, dtype: Dtype) -> float:
        """Operations a second at best."""
        return (self.bfloat16_tflops if dtype == "bfloat16" else self.float32_tflops) * 1e12

    @property
    def memory_bytes(self) -> int:
        """Memory that a process finds on it."""
        return int(self.memory_gib * GIB)


def _kind(memory: float, bf16: float, fp32: float, bandwidth: float, link: float, host: float = 25.0) -> DeviceKind:
    return DeviceKind(
        memory_gib=memory,
        bfloat16_tflops=bf16,
        float32_tflops=fp32,
        memory_gb_s=bandwidth,
        link_gb_s=link,
        host_gb_s=host,
    )


DEVICES: dict[str, DeviceKind] = {
    "H100": _kind(79.1, 989, 67, 3350, 450, 55),
    "H200": _kind(139.7, 989, 67, 4800, 450, 55),
    "B200": _kind(178.0, 2250, 80, 8000, 900, 55),
    "A100-80G": _kind(79.1, 312, 19.5, 2039, 300),
    "A100-40G": _kind(39.4, 312, 19.5, 1555, 300),
    "L40S": _kind(44.4, 362, 91.6, 864, 25),
    "L4": _kind(22.0, 121, 30.3, 300, 25),
    "A10": _kind(22.0, 125, 31.2, 600, 25),
    "A10G": _kind(22.0, 70, 35, 600, 25),
    # One core with AVX-512 and its share of a server's memory bandwidth; `rlhf-ray calibrate` measures the real ones.
    "CPU": DeviceKind(
        memory_gib=1,
        bfloat16_tflops=0.05,
        float32_tflops=0.05,
        memory_gb_s=10,
        link_gb_s=5,
        host_gb_s=10,
        is_cpu=True,
    ),
}
"""By name, as a cluster file's `device` names them."""

RAY_NAMES = {"A100": "A100-40G", "A100-SXM4-40GB": "A100-40G", "A100-SXM4-80GB": "A100-80G", "A10G": "A10G"}
"""Ray's accelerator types that are named otherwise here. Ray can call either size of an A100 plainly so: the smaller is
assumed."""
