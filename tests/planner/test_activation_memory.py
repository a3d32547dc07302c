"""What the planner counts of a forward pass, against what torch saves and makes on small models."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlhf_ray.config.training import Dtype, Lora
from rlhf_ray.models.attention import PACKED_ATTENTION
from rlhf_ray.models.heads import CausalModel
from rlhf_ray.models.lora import add_adapters
from rlhf_ray.models.lora_sizes import adapted_layers, adapter_sizes
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.models.shapes import ModelShape
from rlhf_ray.planner.activation_memory import PassShape

LENGTHS = (96, 96, 96)
TOKENS, POSITIONS = sum(LENGTHS), 150
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 96},
    "qwen3_moe": EXPERTS,
}


def model_of(model_type: str, dtype: Dtype, *, checkpointing: bool) -> tuple[CausalModel, ModelShape]:
    values = {**SIZES, **FAMILIES[model_type]}
    config = CONFIG_MAPPING[model_type](**values)
    auto: Any = AutoModelForCausalLM
    inner = auto.from_config(config, dtype=getattr(torch, dtype), attn_implementation=PACKED_ATTENTION)
    if checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return CausalModel(inner, vocab_chunk_tokens=64).train(), ModelShape.of(
        {**values, "model_type": model_type}, model_type
    )


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of what autograd keeps, by storage; weights are not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(storage)  # so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def forward(model: CausalModel) -> None:
    packed = PackedSequences.of([np.arange(length, dtype=np.int32) for length in LENGTHS], torch.device("cpu"))
    positions = torch.arange(POSITIONS)
    model(packed, positions, torch.zeros_like(positions), 1.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_layers_keep_is_what_torch_saves(model_type: str, dtype: Dtype) -> None:
    model, shape = model_of(model_type, dtype, checkpointing=False)
    with saved_bytes(model) as found:
        forward(model)
    expected = PassShape(shape, dtype, cpu=True).saved_bytes(TOKENS)
    # Places and positions of the pack, rotary tables, and what the head keeps, which are counted with the head.
    beside = PassShape(shape, dtype, cpu=True).item * 64 * POSITIONS
    assert sum(found.values()) == pytest.approx(expected + beside, rel=0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_checkpointing_keeps_what_goes_into_each_layer(dtype: Dtype) -> None:
    model, shape = model_of("llama", dtype, checkpointing=True)
    with saved_bytes(model) as found:
        forward(model)
    planned = PassShape(shape, dtype, cpu=True, checkpointing=True)
    expected = planned.saved_bytes(TOKENS) + planned.item * 64 * POSITIONS
    assert sum(found.values()) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("down_proj",)], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_frozen_weights_keep_less(model_type: str, targets: Any) -> None:
    model, shape = model_of(model_type, "bfloat16", checkpointing=False)
    lora = Lora(rank=8, targets=targets)
    add_adapters(model, lora, "model")
    model.to(torch.bfloat16)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(adapter_sizes(shape, lora)) == trained
    with saved_bytes(model) as found:
        forward(model)
    planned = PassShape(shape, "bfloat16", cpu=True, adapter_rank=8, adapted=adapted_layers(shape, lora))
    # The graph begins at the first adapter; what comes before it in the first of the three layers keeps nothing.
    assert sum(found.values()) <= planned.saved_bytes(TOKENS) * 1.02 + 2 * 64 * POSITIONS
    assert sum(found.values()) >= planned.saved_bytes(TOKENS) * 2 / 3


def test_experts_get_adapters_too() -> None:
    model, shape = model_of("qwen3_moe", "bfloat16", checkpointing=False)
    lora = Lora(rank=8)
    add_adapters(model, lora, "model")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(adapter_sizes(shape, lora)) == trained
