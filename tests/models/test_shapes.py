"""Tensors that a shape has from config.json alone, against transformers' own models on the meta device."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_ray.models.config_json import PUBLIC_MODELS, read_shape
from rlhf_ray.models.shapes import FAMILIES, FLAG_DEFAULTS, ModelShape, ShapeError

# What the model cards name, to the last parameter.
PARAMETERS = {
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 512,
}
TINY_EXPERTS = {**TINY, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CASES = {
    **{name: dict(PUBLIC_MODELS[name]) for name in PARAMETERS},
    "llama-biased": {**TINY, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-tied": {**TINY, "model_type": "llama", "tie_word_embeddings": True},
    "mistral": {**TINY, "model_type": "mistral"},
    "qwen2": {key: value for key, value in TINY.items() if key != "head_dim"} | {"model_type": "qwen2"},
    "gemma": {**TINY, "model_type": "gemma"},
    "gemma3": {**TINY, "model_type": "gemma3_text"},
    "mixtral": {**TINY, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2-moe": {
        **{key: value for key, value in TINY_EXPERTS.items() if key != "head_dim"},
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 96,
    },
    "qwen3-moe-with-dense-layers": {
        **TINY_EXPERTS,
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
        "num_hidden_layers": 4,
    },
}


def built(config: dict[str, Any], *, scalar: bool) -> Any:
    auto: Any = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    arguments = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    of_transformers = CONFIG_MAPPING[config["model_type"]](**arguments, **({"num_labels": 1} if scalar else {}))
    with torch.device("meta"):
        return auto.from_config(of_transformers)


@pytest.mark.parametrize("scalar", [False, True], ids=["vocabulary", "scalar"])
@pytest.mark.parametrize("name", CASES)
def test_tensors_are_those_of_transformers(name: str, scalar: bool) -> None:
    shape = ModelShape.of(CASES[name], name).with_head("scalar" if scalar else "vocabulary")
    model = built(CASES[name], scalar=scalar)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    expected = Counter(tuple(parameter.shape) for parameter in model.parameters())
    ours: Counter[tuple[int, ...]] = Counter()
    for tensor in shape.tensors():
        ours[tensor.shape] += tensor.count
    assert ours == expected
    linear = {key.split(".", 3)[-1] for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {
        "lm_head",
        "score",
    }
    assert {tensor.name.removesuffix(".weight") for tensor in shape.tensors() if tensor.linear} == linear


@pytest.mark.parametrize("name", PARAMETERS)
def test_public_models_have_the_parameters_of_their_cards(name: str) -> None:
    assert read_shape(name).parameters == PARAMETERS[name]


def test_a_token_passes_through_some_of_the_experts() -> None:
    shape = read_shape("Qwen/Qwen3-30B-A3B")
    experts = 48 * 128 * 3 * 2048 * 768
    assert shape.active_parameters == shape.parameters - experts + experts * 8 // 128
    assert round(shape.active_parameters / 1e9, 1) == 3.4  # 3.3 on its card


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    family, config = FAMILIES[model_type], CONFIG_MAPPING[model_type]()
    kv_heads = config.num_attention_heads if family.kv_heads is None else family.kv_heads
    assert config.num_key_value_heads == kv_heads
    head_dim = config.hidden_size // config.num_attention_heads if family.head_dim is None else family.head_dim
    assert (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) == head_dim
    assert config.tie_word_embeddings == family.tied
    for rule in (family.qkv_bias, family.o_bias, family.mlp_bias):
        if isinstance(rule, str):
            assert getattr(config, rule) == FLAG_DEFAULTS.get(rule, False)


def test_a_saved_config_reads_as_the_one_it_was_made_of(tmp_path: Path) -> None:
    for name, config in CASES.items():
        arguments = {key: value for key, value in config.items() if key != "model_type"}
        folder = tmp_path / name.replace("/", "-")
        CONFIG_MAPPING[config["model_type"]](**arguments).save_pretrained(folder)
        assert read_shape(str(folder)).parameters == ModelShape.of(config, name).parameters


def test_a_reward_model_has_a_scalar_head() -> None:
    config = {**TINY, "model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
    assert ModelShape.of(config, "reward").head == "scalar"


def test_a_folder_and_its_file_are_the_same_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "llama"}))
    assert read_shape(str(tmp_path)).parameters == read_shape(str(tmp_path / "config.json")).parameters


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {**TINY, "model_type": "mamba"},
            "model 'm': the planner does not know model_type 'mamba' (known: llama, mistral, qwen2, qwen3, gemma, "
            "gemma3_text, mixtral, qwen2_moe, qwen3_moe), so it can't tell what its layers are made of; "
            "`rlhf-ray train` may still run it",
        ),
        ({"model_type": "llama", "hidden_size": 4}, "model 'm': its config.json has no num_attention_heads"),
        (
            {**TINY, "model_type": "llama", "vocab_size": "many"},
            "model 'm': vocab_size in its config.json is 'many', not a positive number",
        ),
        ({**TINY, "model_type": "mixtral"}, "model 'm': its config.json has no num_local_experts"),
    ],
)
def test_what_can_not_be_read_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        ModelShape.of(config, "m")
    assert str(caught.value) == message


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="the folder has no config.json"):
        read_shape(str(tmp_path))
    with pytest.raises(ShapeError, match="no such folder"):
        read_shape("models/nowhere")


def test_a_name_that_the_hub_does_not_give_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ShapeError, match="model 'nobody/nothing': there is no such folder, and its config.json can't be"
    ):
        read_shape("nobody/nothing")
