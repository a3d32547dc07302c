"""A transformers model whose parameters have no memory yet; all else is as `from_pretrained` leaves it."""

import re
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from rlhf_ray.models.stored_weights import StoredWeights


def build_on_meta(
    auto: Any, source: str, config: Any, dtype: torch.dtype, *, attention: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, StoredWeights]:
    """The model, and what its parameters are to be read from.

    Parameters are on the meta device, but for those that the files lack: these are in host memory and drawn as
    transformers draws them. So are buffers: persistent ones as stored, the others computed.

    Args:
        auto: class of transformers that knows the architecture, such as `AutoModelForCausalLM`.
        source: folder or hub name.
        attention: name of the attention function.

    Raises:
        OSError: the files can't be found or read.
        ValueError: the model can't be made of what they hold.
    """
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        raise ValueError(f"its weights are quantized ({quantized}), which zero_stage: 3 does not load")
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    stored = StoredWeights(source, model)
    for name, parameter in model.named_parameters():
        if name in stored:
            _is_initialized(parameter)
        else:
            replace_parameter(model, parameter, nn.Parameter(torch.empty_like(parameter, device="cpu")))
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        module, _, attribute = name.rpartition(".")
        if name in stored:
            value = stored.read(name, 0, buffer.numel()).reshape(buffer.shape)
            # `to` copies where the number format stays the same too: the file is not to be held open.
            value = value.to(torch.float32 if _keeps_float32(model, name) else buffer.dtype, copy=True)
            _is_initialized(value)
        else:
            value = torch.empty_like(buffer, device="cpu")
        setattr(model.get_submodule(module), attribute, value)
    # Computes what is not stored, such as the frequencies of rotary embeddings, and leaves alone what is marked.
    model.initialize_weights()
    if model.can_generate():
        with suppress(OSError):  # the model came without one
            model.generation_config = GenerationConfig.from_pretrained(source)
    return model.eval(), stored


def replace_parameter(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in another's place, in all modules that share it."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter is old:
                setattr(module, name, new)


def _is_initialized(tensor: torch.Tensor) -> None:
    """Mark a tensor that transformers is not to draw or compute."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def _keeps_float32(model: PreTrainedModel, name: str) -> bool:
    """Whether the architecture needs a tensor in float32, such as the bias of a router that picks experts."""
    kept = model._keep_in_fp32_modules_strict or ()
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in kept)
