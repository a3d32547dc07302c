"""Adapters of LoRA: which layers get them, how large they are, and what the frozen weights beside them take."""

from collections.abc import Iterator

from rlhf_ray.config.training import Lora
from rlhf_ray.models.shapes import ModelShape, Tensor

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of one weight in 4 bits: a code of 8 bits for each block of 64, and one in float32 for 256 such blocks (Dettmers et
al. 2023, arXiv:2305.14314, double quantisation)."""


def adapted_tensors(shape: ModelShape, lora: Lora) -> Iterator[Tensor]:
    """Weights of the linear layers that get adapters, as peft chooses them."""
    for tensor in shape.tensors():
        if tensor.linear and (lora.targets == "all-linear" or any(_is_target(tensor, t) for t in lora.targets)):
            yield tensor


def adapted_layers(shape: ModelShape, lora: Lora) -> frozenset[str]:
    """Names of these layers."""
    return frozenset(tensor.name.removesuffix(".weight") for tensor in adapted_tensors(shape, lora))


def adapter_sizes(shape: ModelShape, lora: Lora) -> list[int]:
    """Elements of everything that is trained: A `[rank, in]` and B `[out, rank]` of each layer, and a scalar head."""
    sizes = [
        lora.rank * width
        for tensor in adapted_tensors(shape, lora)
        for width in tensor.shape
        for _ in range(tensor.count)
    ]
    if lora.targets == "all-linear":
        sizes += _of_experts(shape, lora.rank)
    return [*sizes, shape.head_parameters] if shape.head == "scalar" else sizes


def _of_experts(shape: ModelShape, rank: int) -> list[int]:
    """peft adapts the stacked weights of all experts too, where gate and up have one adapter of twice the rank, and
    the router."""
    if shape.experts is None:
        return []
    inner, hidden, number = shape.experts.intermediate, shape.hidden, shape.experts.number
    gate_up, down = 2 * rank * number * (hidden + 2 * inner), rank * number * (inner + hidden)
    return [gate_up, down, rank * (number + hidden)] * shape.kinds[True]


def frozen_bytes(shape: ModelShape, lora: Lora | None, item: int) -> int:
    """The base weights, a trained scalar head not among them."""
    if lora is None:
        return 0
    linear = sum(tensor.size * tensor.count for tensor in shape.tensors() if tensor.linear)
    head = shape.head_parameters if shape.head == "scalar" else 0
    others = shape.parameters - linear - head
    return round(linear * (item if lora.base == "as_model" else NF4_BYTES)) + others * item


def _is_target(tensor: Tensor, target: str) -> bool:
    module = tensor.name.removesuffix(".weight")
    return f".{module}".endswith(f".{target}") or target.endswith(module)
