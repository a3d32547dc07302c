"""The config section of an engine in DeepSpeed's own words."""

from typing import Any

import torch
from torch import nn

from rlhf_ray.config import training as config
from rlhf_ray.engines.own_folder import OwnFolder
from rlhf_ray.platform import platform

REDUCE_BUCKET = 500_000_000
"""Elements of gradients that are reduced together at most; DeepSpeed's default."""


def deepspeed_settings(
    engine: config.TrainingEngine | config.ScoringEngine, model: nn.Module, swap: OwnFolder | None
) -> dict[str, Any]:
    """What `deepspeed.initialize` is told.

    Args:
        model: that it is for; its shapes count, it may be on the meta device.
        swap: where what is offloaded to nvme goes, None when nothing is.
    """
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage == 3:
        # Gather a layer at a time; small tensors (norms) stay whole because gathering them costs more than it saves.
        zero |= {"stage3_param_persistence_threshold": 10_000, "stage3_gather_16bit_weights_on_model_save": False}
        if engine.offload_parameters != "none":
            zero["offload_param"] = _offload(engine.offload_parameters, swap)
        if engine.offload_parameters == "nvme":
            largest = max(parameter.numel() for parameter in model.parameters())
            part = -(-largest // torch.distributed.get_world_size())
            # Buffers must hold any part; without max_in_cpu the first billion elements would stay in host memory.
            zero["offload_param"] |= {"buffer_size": part, "max_in_cpu": 0}
            # A weight has a buffer until it is released, and there are five: none is kept for its next use.
            zero["stage3_max_reuse_distance"] = 0
    settings: dict[str, Any] = {
        # Micro-batches are of any size and number: the boundary is set by hand, sizes here are formal.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": engine.dtype == "bfloat16"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if isinstance(engine, config.TrainingEngine):
        settings["gradient_clipping"] = engine.gradient_clip
        # DeepSpeed allocates the bucket whole in every backward pass. What small models leave unused of it would be
        # cut up by other tensors in host memory, and the next bucket be allocated beside it.
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        zero["reduce_bucket_size"] = min(REDUCE_BUCKET, trained)
        if engine.zero_stage in (1, 2):
            ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
            zero["overlap_comm"] = overlaps(platform().device.type, ranks)
        if engine.offload_optimizer != "none":
            zero["offload_optimizer"] = _offload(engine.offload_optimizer, swap)
        if engine.offload_optimizer == "nvme":
            # What is in host memory at a time: 16 bytes of buffers for each element.
            zero["sub_group_size"] = 50_000_000
    return settings


def overlaps(device: str, ranks: int) -> bool:
    """Whether gradients are reduced while the backward pass goes on; it takes a second bucket.

    In stage 3 DeepSpeed does so by itself. On CPU a reduction is not in the background.
    """
    return device == "cuda" and ranks > 1


def _offload(place: config.Offload, swap: OwnFolder | None) -> dict[str, Any]:
    return {"device": place} if swap is None else {"device": place, "nvme_path": str(swap.path)}
