"""Adapters change what they should, and what is made of them is the model that is trained."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_ray.config.training import Lora
from rlhf_ray.models.heads import ModelError, load_causal, load_scalar
from rlhf_ray.models.lora import Adapter, adapters_off
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.models.role_models import CausalModel, ScalarModel
from rlhf_ray.models.weights import model_weights

FLOAT = torch.float32
LORA = Lora(rank=4, alpha=8.0)
TEXTS = [torch.arange(3, 40).int().numpy(), torch.arange(50, 70).int().numpy()]

Load = Callable[..., CausalModel | ScalarModel]


def causal(folder: Path, lora: Lora | None = LORA, dtype: torch.dtype = FLOAT) -> CausalModel:
    return load_causal(str(folder), dtype=dtype, vocab_chunk_tokens=16, lora=lora)


def scalar(folder: Path, lora: Lora | None = LORA, dtype: torch.dtype = FLOAT) -> ScalarModel:
    return load_scalar(str(folder), dtype=dtype, seed=3, lora=lora)


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """As if it had been trained: everything that is trained is another, B too."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random).to(parameter.dtype))
    return model


def outputs(model: nn.Module) -> torch.Tensor:
    """Log-probs and entropies, or values, at every place of two sequences."""
    packed = PackedSequences.of(TEXTS, torch.device("cpu"))
    places = torch.arange(packed.input_ids.shape[1])
    if isinstance(model, ScalarModel):
        out: torch.Tensor = model(packed, places)
        return out
    return torch.stack(model(packed, places, packed.input_ids[0], 1.0))


def merged_into(model: nn.Module, plain: nn.Module) -> nn.Module:
    """`plain` with the merged weights of `model`."""
    plain.model.load_state_dict({weight.name: weight.value() for weight in model_weights(model)}, strict=False)  # type: ignore[operator, union-attr]
    return plain


@pytest.mark.parametrize("load", [causal, scalar])
def test_a_new_adapter_changes_nothing(load: Load, tiny_model_dir: Path) -> None:
    assert torch.equal(outputs(load(tiny_model_dir)), outputs(load(tiny_model_dir, lora=None)))


@pytest.mark.parametrize("load", [causal, scalar])
def test_merged_weights_are_the_model_with_its_adapters(load: Load, tiny_model_dir: Path) -> None:
    model = moved(load(tiny_model_dir))
    plain = load(tiny_model_dir, lora=None)
    assert (outputs(model) - outputs(plain)).abs().max() > 0.1
    torch.testing.assert_close(outputs(merged_into(model, plain)), outputs(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("load", [causal, scalar])
def test_merged_weights_are_all_weights_of_the_model(load: Load, tiny_model_dir: Path) -> None:
    weights = model_weights(load(tiny_model_dir))
    plain = model_weights(load(tiny_model_dir, lora=None))
    assert [(w.name, w.shape, w.dtype) for w in weights] == [(w.name, w.shape, w.dtype) for w in plain]
    assert [(w.name, tuple(w.value().shape), w.value().dtype) for w in weights] == [
        (w.name, w.shape, w.dtype) for w in weights
    ]
    adapted = {weight.name.split(".")[-2] for weight in weights if weight.adapter is not None}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_merged_weights_keep_the_models_number_format(tiny_model_dir: Path) -> None:
    """The sum is made in float32: rounded once, not twice."""
    model = moved(causal(tiny_model_dir, dtype=torch.bfloat16))
    [weight] = [w for w in model_weights(model) if w.name == "model.layers.1.mlp.up_proj.weight"]
    base, a, b = (part.detach().float() for part in weight.parts)
    assert torch.equal(weight.value(), (base + 2.0 * b @ a).bfloat16())


def test_with_adapters_off_the_model_is_its_base_to_the_last_bit(tiny_model_dir: Path) -> None:
    model = moved(causal(tiny_model_dir))
    trained = outputs(model)
    with adapters_off(model):
        assert torch.equal(outputs(model), outputs(causal(tiny_model_dir, lora=None)))
    assert torch.equal(outputs(model), trained)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_adapters_come_on_again_after_an_error(tiny_model_dir: Path) -> None:
    model = moved(causal(tiny_model_dir))
    trained = outputs(model)
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        raise ZeroDivisionError
    assert torch.equal(outputs(model), trained)


def test_a_model_without_adapters_has_no_base_to_go_back_to(tiny_model_dir: Path) -> None:
    with pytest.raises(ValueError, match="no adapters to turn off"), adapters_off(causal(tiny_model_dir, lora=None)):
        pass


@pytest.mark.parametrize("load", [causal, scalar])
def test_only_adapters_and_a_scalar_head_are_trained(load: Load, tiny_model_dir: Path) -> None:
    model = moved(load(tiny_model_dir))
    outputs(model).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == ({"model.score.weight"} if load is scalar else set())
    assert len([name for name in trained if "lora_" in name]) == 2 * 7 * 2
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in trained)  # type: ignore[union-attr]


@pytest.mark.parametrize("load", [causal, scalar])
def test_a_state_dict_has_what_is_trained_and_loads_again(load: Load, tiny_model_dir: Path) -> None:
    model = moved(load(tiny_model_dir))
    state = model.state_dict()
    assert set(state) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    other = moved(load(tiny_model_dir), seed=9)
    other.load_state_dict(state)
    assert torch.equal(outputs(other), outputs(model))
    del state[next(iter(state))]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


def test_only_the_named_layers_get_adapters(tiny_model_dir: Path) -> None:
    model = causal(tiny_model_dir, Lora(rank=2, targets=("q_proj", "v_proj")))
    adapted = {weight.name for weight in model_weights(model) if weight.adapter is not None}
    assert adapted == {
        f"model.layers.{layer}.self_attn.{name}.weight"
        for layer in (0, 1)
        for name in "qv"
        for name in [f"{name}_proj"]
    }


@pytest.mark.parametrize("target", ["nope", "lm_head", "embed_tokens", "score"])
def test_a_target_that_can_have_no_adapter_is_named_with_those_that_can(target: str, tiny_model_dir: Path) -> None:
    for load in (causal, scalar):
        with pytest.raises(
            ModelError, match=f"targets: '{target}' is no linear layer of its decoder, which has down_proj, "
        ):
            load(tiny_model_dir, Lora(targets=("q_proj", target)))


def test_the_adapter_loads_with_peft_and_is_the_same_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    for load, auto, folder in (
        (causal, AutoModelForCausalLM, tmp_path / "causal"),
        (scalar, AutoModelForSequenceClassification, tmp_path / "scalar"),
    ):
        model = moved(load(tiny_model_dir))
        Adapter.of(model, dict(model.state_dict())).write(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(tiny_model_dir), 4, 8.0)
        more = {} if load is causal else {"num_labels": 1}
        theirs = PeftModel.from_pretrained(auto.from_pretrained(tiny_model_dir, dtype=FLOAT, **more), folder)
        plain = load(tiny_model_dir, lora=None)
        plain.model.load_state_dict(theirs.merge_and_unload().state_dict())
        torch.testing.assert_close(outputs(plain), outputs(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("load", [causal, scalar])
def test_weights_in_four_bits_are_merged_as_the_model_computes_with_them(load: Load, tiny_model_dir: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = moved(load(tiny_model_dir, Lora(rank=4, alpha=8.0, base="nf4")))
    model.train()  # as in training: outside of it bitsandbytes repacks the codes on a CPU
    plain = load(tiny_model_dir, lora=None)
    with adapters_off(model):
        assert (outputs(model) - outputs(plain)).abs().max() > 0.01, "the base is another after rounding"
    torch.testing.assert_close(outputs(merged_into(model, plain)), outputs(model), rtol=0, atol=1e-4)
    assert not hasattr(model.model.config, "quantization_config")
