"""The one place where CPU and GPU differ: which device, which collectives, which transfer, which attention."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

TransferBackend = Literal["nccl", "ipc", "gloo"]
Attention = Literal["varlen_flash", "bucketed"]


@dataclass(frozen=True)
class Platform:
    """What this process computes on.

    Attributes:
        device: of models and batches.
        collectives: torch.distributed backend between the ranks of a role.
    """

    device: torch.device
    collectives: Literal["nccl", "gloo"]


@cache
def platform() -> Platform:
    """The platform of this process. Ray shows an actor only the GPU that was reserved for it."""
    if torch.cuda.is_available():
        return Platform(torch.device("cuda", 0), "nccl")
    return Platform(torch.device("cpu"), "gloo")


def attention_of(device: str, dtype: torch.dtype) -> Attention:
    """How packed sequences attend on a kind of device (see models/attention.py). Flash kernels take 16 bits alone."""
    return "varlen_flash" if device == "cuda" and dtype in (torch.bfloat16, torch.float16) else "bucketed"


def to_device(tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """A tensor in host memory, copied to a device without waiting for what the device still does.

    From memory that is not page-locked, CUDA would wait for all that it was given before.

    Args:
        device: by default that of this process.
    """
    device = device or platform().device
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # its allocator keeps the memory until the copy is made
    return tensor.to(device, non_blocking=True)


def device_names() -> list[str]:
    """Names of the GPUs that this process sees, none on a machine without."""
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def device_count() -> int:
    """GPUs of this machine, those that this process does not see among them; 0 on CPU. The driver is asked."""
    if platform().device.type == "cpu":
        return 0
    import pynvml

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetCount())


def transfer_backend(same_devices: bool) -> TransferBackend:
    """vLLM's weight-transfer backend to engines that sit on the policy's devices, or on others. NCCL refuses two
    processes on one device, where CUDA shares memory between them."""
    if platform().device.type == "cpu":
        return "gloo"
    return "ipc" if same_devices else "nccl"


def machine_name() -> str:
    """What this machine computes with: the kind of its GPUs, else its CPU and the cores that this process may use."""
    devices = device_names()
    if devices:
        return devices[0]
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {cores()} cores"


@dataclass(frozen=True)
class CpuProducts:
    """How a CPU multiplies matrices of bfloat16 numbers.

    Attributes:
        in_bfloat16: it has instructions for them, with which they are faster than those of float32.
        why: how that is known, to go on after "CPU": `has AVX512_BF16`.
        times_as_long: what such a product takes of the time of one in float32, in words; empty with `in_bfloat16`.
    """

    in_bfloat16: bool
    why: str
    times_as_long: str = ""


# oneDNN, which makes PyTorch's products of bfloat16 on a CPU, uses no instructions beyond the set that the first of
# these variables names, in whichever case; it takes a word that it does not know for none.
ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_AVX2_SETS = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2")
_AVX512_SETS = ("AVX512_CORE", "AVX512_CORE_VNNI")
_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")
# Measured by `python -m benchmarks.bfloat16_products` (docs/benchmarks.md).
_WITH_AVX512, _WITHOUT = "1.3 times as long", "4 to 60 times as long"


def cpu_products(cpuinfo: str, environ: Mapping[str, str]) -> CpuProducts:
    """What PyTorch makes of bfloat16 on a CPU.

    With AVX512_BF16 or AMX, oneDNN multiplies in bfloat16. With AVX-512 alone it converts to float32 first, which takes
    a little longer than products of float32. With less, a product takes 4 to 60 times as long, by the layout of its
    factors. `ATEN_CPU_CAPABILITY` changes PyTorch's own kernels and none of the products.

    Args:
        cpuinfo: text of the CPU's /proc/cpuinfo.
        environ: environment of the process that computes.
    """
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    flags = next((value.split() for key, _, value in lines if key.strip() == "flags"), [])
    variable = next((name for name in ISA_VARIABLES if environ.get(name)), None)
    most = "" if variable is None else environ[variable].upper()
    times_as_long = _WITH_AVX512 if "avx512f" in flags and most not in _AVX2_SETS else _WITHOUT
    if most in (*_AVX2_SETS, *_AVX512_SETS):
        return CpuProducts(False, f"is held to {most} by {variable}", times_as_long)
    has = [flag for flag in _BFLOAT16_FLAGS if flag in flags]
    if has:
        return CpuProducts(True, f"has {' and '.join(flag.upper() for flag in has)}")
    return CpuProducts(False, "has neither AVX512_BF16 nor AMX", times_as_long)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def synchronize() -> None:
    """Wait until the device has done all that it was given."""
    if platform().device.type == "cuda":
        torch.cuda.synchronize()


def device_memory() -> tuple[int, int] | None:
    """Bytes in use, by whichever process, and in all, of the devices that this process sees; None on CPU.

    The driver is asked, not CUDA, which takes memory of the device for each process that asks.
    """
    if platform().device.type == "cpu":
        return None
    import pynvml

    pynvml.nvmlInit()
    slices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.startswith("MIG-")]
    if slices:  # CUDA shows a process one of them, which torch does not find among the GPUs' names
        handles = [pynvml.nvmlDeviceGetHandleByUUID(slices[0])]
    else:
        seen = [torch.cuda._get_nvml_device_index(number) for number in range(torch.cuda.device_count())]
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in seen]
    found = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
    return sum(memory.used for memory in found), sum(memory.total for memory in found)
