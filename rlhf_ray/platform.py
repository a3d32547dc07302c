"""The one place where CPU and GPU differ: which device, which collectives, which transfer, which attention."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

TransferBackend = Literal["nccl", "ipc", "gloo"]


@dataclass(frozen=True)
class Platform:
    """What this process computes on.

    Attributes:
        device: of models and batches.
        collectives: torch.distributed backend between the ranks of a role.
        weight_transfer: vLLM weight-transfer backends from the policy to rollout engines: on other devices, and on its
            own, where NCCL refuses two processes and CUDA shares memory between them.
        attention: attention over packed sequences (see models/attention.py).
        deepspeed: accelerator name for DeepSpeed.
    """

    device: torch.device
    collectives: Literal["nccl", "gloo"]
    weight_transfer: tuple[TransferBackend, TransferBackend]
    attention: Literal["varlen_flash", "bucketed"]
    deepspeed: Literal["cuda", "cpu"]


@cache
def platform() -> Platform:
    """The platform of this process. Ray shows an actor only the GPU that was reserved for it."""
    if torch.cuda.is_available():
        return Platform(torch.device("cuda", 0), "nccl", ("nccl", "ipc"), "varlen_flash", "cuda")
    return Platform(torch.device("cpu"), "gloo", ("gloo", "gloo"), "bucketed", "cpu")


def device_names() -> list[str]:
    """Names of the GPUs that this process sees, none on a machine without."""
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def transfer_backend(same_devices: bool) -> TransferBackend:
    """How weights get to engines that sit on the policy's devices, or on others."""
    apart, together = platform().weight_transfer
    return together if same_devices else apart


def machine_name() -> str:
    """What this machine computes with: the kind of its GPUs, else its CPU and the cores that this process may use."""
    devices = device_names()
    if devices:
        return devices[0]
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {cores()} cores"


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
