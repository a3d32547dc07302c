"""DeepSpeed's Adam for optimizer state in host memory, and the threads that it gets."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rlhf_ray.config.placement import DEFAULT_THREADS
from rlhf_ray.platform import cores, device_count, platform


def cpu_adam(parameters: Sequence[nn.Parameter], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer. Its kernel is compiled at first use, by the C++ compiler of the machine.

    A rank on a GPU reserves few CPUs, of which it needs one to drive the GPU; a step in host memory would take minutes
    on it. So where nobody has chosen its threads, it takes the part of the machine's cores that falls to one GPU.
    """
    if platform().device.type == "cuda" and DEFAULT_THREADS in os.environ:
        threads = step_threads(torch.get_num_threads(), cores(), device_count())
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the kernel's own OpenMP, which is loaded with it
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)
    return optimizer


def step_threads(reserved: int, machine_cores: int, devices: int) -> int:
    """Threads for the optimizer steps of one of several ranks with a device each; never fewer than were reserved."""
    return max(reserved, machine_cores // max(1, devices))
