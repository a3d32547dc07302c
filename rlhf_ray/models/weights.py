"""The weights of a role's model under their Hugging Face names, whatever they are made of here."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ADAPTER_NAME = "default"
"""peft's name of an adapter that has been given none; names of parameters have it."""


@dataclass(frozen=True)
class Weight:
    """One weight of the model.

    Attributes:
        name: in the model's own format.
        parameter: what it is held in, without its adapter; a shard under ZeRO-3, codes of 4 bits with `nf4`.
        adapter: peft's layer with the adapter that changes it, None without one.
    """

    name: str
    parameter: nn.Parameter
    adapter: Any = None

    @property
    def parts(self) -> list[nn.Parameter]:
        """The parameters that must be whole for `value`."""
        if self.adapter is None:
            return [self.parameter]
        pair = (self.adapter.lora_A[ADAPTER_NAME], self.adapter.lora_B[ADAPTER_NAME])
        return [self.parameter, *(layer.weight for layer in pair)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `value`."""
        decoded = self._decoded
        return tuple(getattr(decoded, "ds_shape", decoded.shape))  # where ZeRO-3 keeps it

    @property
    def dtype(self) -> torch.dtype:
        """Number format of `value`."""
        dtype: torch.dtype = self._decoded.dtype
        return dtype

    @property
    def bytes(self) -> int:
        """Size of `value`."""
        return math.prod(self.shape) * self.dtype.itemsize

    def value(self) -> torch.Tensor:
        """What the model computes with: W + (alpha / rank) · B·A, added in float32. W itself where nothing is added."""
        weight = self.parameter.data
        if self._decoded is not self.parameter:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight, self._decoded)
        if self.adapter is None:
            return weight
        _, a, b = self.parts
        change = self.adapter.scaling[ADAPTER_NAME] * (b.data.float() @ a.data.float())
        return (weight.float() + (change.T if self.adapter.fan_in_fan_out else change)).to(weight.dtype)

    @property
    def _decoded(self) -> Any:
        """What knows shape and number format of the weight without its adapter."""
        return getattr(self.parameter, "quant_state", self.parameter)


def model_weights(model: nn.Module) -> list[Weight]:
    """All weights of a role's model: one that is tied to another once, adapters as a part of what they change."""
    found = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        layer = name.removesuffix(".base_layer.weight")
        adapter = model.get_submodule(layer) if layer != name else None
        found.append(Weight(hub_name(name), parameter, adapter))
    return found


def hub_name(name: str) -> str:
    """The Hugging Face name of a parameter of a role's model."""
    return name.removeprefix("model.").replace(".base_layer.", ".")
