"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) in the roles' models.

peft puts them into the transformers model in place, which otherwise stays what it is. B starts at 0, so a model starts
as its base. The state dict of a model with adapters holds what is trained and nothing else.
"""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BitsAndBytesConfig

from rlhf_ray.config.training import Lora
from rlhf_ray.models.weights import ADAPTER_NAME

ADAPTER_FOLDER = "adapter"
"""Where an export has the adapter, beside the merged model."""


@dataclass(frozen=True)
class Adapter:
    """An adapter as peft writes it.

    Attributes:
        config: text of adapter_config.json.
        tensors: by peft's names, in host memory.
    """

    config: str
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module, trained: Mapping[str, torch.Tensor]) -> "Adapter":
        """The adapter of a role's model from what is trained of it, by names of parameters."""
        inner: Any = model.model
        settings = inner.peft_config[ADAPTER_NAME].to_dict()
        settings |= {
            "inference_mode": True,
            "target_modules": sorted(settings["target_modules"]),
            "modules_to_save": _trained_whole(model) or None,
        }
        tensors = {
            f"base_model.{name.replace(f'.{ADAPTER_NAME}.', '.')}": tensor.contiguous()
            for name, tensor in trained.items()
        }
        return cls(json.dumps(settings, indent=2, sort_keys=True), tensors)

    def write(self, folder: Path) -> None:
        """Write both files into `folder`, which is created when missing."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(self.config)
        save_file(self.tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def missing_package(lora: Lora) -> str | None:
    """What is to be installed before the base weights can be held as `lora` says, None when all is there."""
    if lora.base == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        return "lora.base: nf4 needs bitsandbytes, which is not installed: pip install 'rlhf_ray[nf4]'"
    return None


def quantization(lora: Lora | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How transformers loads the base weights: as they are, or as QLoRA does (Dettmers et al. 2023, arXiv:2305.14314).

    Linear layers of the decoder are held in 4 bits and computed with in `dtype`; the heads stay as they are.
    """
    if lora is None or lora.base == "as_model":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=lora.base,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "score"],
    )


def add_adapters(model: nn.Module, lora: Lora, source: str) -> None:
    """Give a `CausalModel` or `ScalarModel` adapters and freeze all else but a scalar head.

    A is drawn from torch's default generator.

    Args:
        source: folder or hub name of the base model, for those who load the adapter.

    Raises:
        ValueError: a target that is no linear layer of the decoder.
    """
    from peft import LoraConfig, inject_adapter_in_model

    inner: Any = model.model
    whole = _trained_whole(model)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        task_type="SEQ_CLS" if whole else "CAUSAL_LM",
        base_model_name_or_path=source,
    )
    linear = _linear_layers(inner, whole)
    for target in () if isinstance(lora.targets, str) else lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(f"targets: {target!r} is no linear layer of its decoder, which has {', '.join(known)}")
    inject_adapter_in_model(config, inner)
    if lora.base != "as_model":
        # What is written of the model is decoded and merged, so its config must not ask for 4 bits.
        inner.hf_quantizer = None
        del inner.config.quantization_config
    for name in whole:
        inner.get_submodule(name).requires_grad_(True)
    model.register_state_dict_post_hook(_keep_trained)
    model.register_load_state_dict_post_hook(_frozen_is_not_missing)


@contextmanager
def adapters_in_memory(model: nn.Module) -> Iterator[None]:
    """Within it, `add_adapters` gives adapters to a model on the meta device that are in host memory, drawn as usual.

    peft puts an adapter on the device of the weight that it changes, where on the meta device its numbers would be
    lost. So the weights are stood in for by tensors of their shape that have memory for one number.
    """
    real = {}
    inner: Any = model.model
    for layer in map(inner.get_submodule, _linear_layers(inner, _trained_whole(model))):
        real[layer] = weight = layer.weight
        layer.weight = nn.Parameter(torch.empty((), dtype=weight.dtype).expand(weight.shape))
    try:
        yield
    finally:
        for layer, weight in real.items():
            layer.weight = weight.requires_grad_(layer.weight.requires_grad)


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` has been here."""
    return hasattr(model.model, "peft_config")


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Have a role's model compute as its base model does.

    Raises:
        ValueError: it has no adapters, so what it was before training is gone.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    if not layers:
        raise ValueError("this model has no adapters to turn off")
    for layer in layers:
        layer._disable_adapters = True  # peft's own switch would also make them untrainable under DeepSpeed's hooks
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _trained_whole(model: nn.Module) -> list[str]:
    """Modules without adapters that are trained all the same: the scalar head."""
    return ["score"] if hasattr(model.model, "score") else []


def _linear_layers(model: Any, whole: list[str]) -> list[str]:
    """Names of the layers that can have adapters. The vocabulary head can't: its weight is used a chunk at a time."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and module is not head
        and name not in whole
    ]


def _keep_trained(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    trained = {f"{prefix}{name}" for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in state.keys() - trained:
        del state[name]


def _frozen_is_not_missing(model: nn.Module, keys: Any) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in trained]
