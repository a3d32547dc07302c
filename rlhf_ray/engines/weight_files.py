"""A sharded model as Hugging Face files, of which no rank ever holds more than one."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from rlhf_ray.engines.training import full_weights
from rlhf_ray.models.saving import save_model
from rlhf_ray.models.weights import model_weights


def is_written_as_held(model: Any) -> bool:
    """Whether the files of a role's model hold the tensors that it has, and none that transformers makes them of."""
    return not get_model_conversion_mapping(model.model, add_legacy=False)


def write_sharded(model: nn.Module, folder: Path | None, file_bytes: int = 5 * 10**9) -> None:
    """Write config and all weights, adapters merged; collective, and the rank that is given a folder writes.

    Args:
        file_bytes: size of a file; a larger tensor has one of its own.
    """
    plan = split_state_dict_into_shards_factory(
        {weight.name: weight for weight in model_weights(model)},
        get_storage_size=lambda weight: weight.bytes,
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".", "{suffix}."),
        max_shard_size=file_bytes,
    )
    if folder is not None:
        inner: Any = model.model
        save_model(inner, folder, weights={})
    unfinished: dict[str, dict[str, torch.Tensor]] = {file: {} for file in plan.filename_to_tensors}
    for name, tensor in full_weights(model, bucket_bytes=256 * 2**20):
        if folder is None:
            continue
        file = plan.tensor_to_filename[name]
        unfinished[file][name] = tensor.detach().to("cpu", copy=True)
        if len(unfinished[file]) == len(plan.filename_to_tensors[file]):
            save_file(unfinished.pop(file), folder / file, metadata={"format": "pt"})
    if folder is not None and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
