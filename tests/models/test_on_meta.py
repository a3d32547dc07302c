"""A model that is read a part at a time is the model that transformers loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from rlhf_ray.config.training import Lora
from rlhf_ray.models import stored_weights
from rlhf_ray.models.heads import ModelError, load_causal, load_scalar
from rlhf_ray.models.on_meta import build_on_meta, replace_parameter
from rlhf_ray.models.role_models import CausalModel, ScalarModel
from rlhf_ray.models.stored_weights import StoredWeights
from rlhf_ray.models.weights import hub_name

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "scaled rotary frequencies": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "biases": Qwen2Config(**SIZES),
    "names without the model's prefix": GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4),
    "experts that transformers stacks": MixtralConfig(**SIZES, num_local_experts=3),
    "a router's float32 buffer": DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a model of random weights, in files of at most `shard` bytes."""

    def save(kind: str, shard: int = 10**9) -> Path:
        folder = tmp_path_factory.mktemp("saved") / "model"
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32)
        for buffer in dict(model.named_buffers()).values():
            if buffer.is_floating_point() and not buffer.any():
                buffer.normal_()  # a router's bias, which begins at 0
        model.save_pretrained(folder, max_shard_size=shard)
        if kind.startswith("names without"):
            for file in folder.glob("*.safetensors"):
                save_file({name.removeprefix("transformer."): w for name, w in load_file(file).items()}, file)
        return folder

    return save


def built(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, StoredWeights]:
    config = AutoModelForCausalLM.from_pretrained(folder).config
    return build_on_meta(AutoModelForCausalLM, str(folder), config, dtype, attention="sdpa", trust_remote_code=False)


def filled(model: nn.Module, stored: StoredWeights, ranks: int) -> nn.Module:
    """The model with its weights, put together from the parts of so many ranks."""
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype)
            size = -(-parameter.numel() // ranks)
            for start in range(0, parameter.numel(), size):
                part = stored.read(hub_name(name) if isinstance(model, CausalModel | ScalarModel) else name,
                                   start, min(start + size, parameter.numel()))  # fmt: skip
                assert part.shape == (min(size, parameter.numel() - start),)
                whole.view(-1)[start : start + size] = part
            replace_parameter(model, parameter, nn.Parameter(whole, parameter.requires_grad))
    return model


def assert_same(mine: nn.Module, theirs: nn.Module) -> None:
    for kind in ("parameters", "buffers"):
        ours, wanted = (dict(getattr(model, f"named_{kind}")()) for model in (mine, theirs))
        assert ours.keys() == wanted.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == wanted[name].dtype, name
            assert tensor.requires_grad == wanted[name].requires_grad, name
            assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("dtype", "ranks", "shard"), [(torch.float32, 3, 10**9), (torch.bfloat16, 2, 20_000)])
def test_the_parts_of_all_ranks_are_the_model_that_transformers_loads(
    saved: Callable[..., Path], kind: str, dtype: torch.dtype, ranks: int, shard: int
) -> None:
    folder = saved(kind, shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard < 10**9)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    mine = filled(*built(folder, dtype), ranks)
    assert_same(mine, theirs)
    assert mine.config.to_dict() == theirs.config.to_dict()
    assert mine.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not mine.training
    tokens = torch.arange(20)[None]
    assert torch.equal(mine(tokens).logits, theirs(tokens).logits)


def test_only_the_rows_of_a_part_are_read(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, stored = built(saved("tied"), torch.float32)
    name, parameter = next(iter(model.named_parameters()))
    width = parameter.shape[1]
    read: list[slice] = []

    class Opened:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> "Opened":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def get_slice(self, key: str) -> "Opened":
            self.rows = self.file.get_slice(key)
            return self

        def __getitem__(self, rows: slice) -> torch.Tensor:
            read.append(rows)
            part: torch.Tensor = self.rows[rows]
            return part

    monkeypatch.setattr(stored_weights, "safe_open", Opened)
    part = stored.read(name, 40 * width + 3, 60 * width - 3)
    assert part.shape == (20 * width - 6,)
    assert read == [slice(40, 60)]


LORA = Lora(rank=4)


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapters"])
def test_a_role_model_is_the_same_with_the_same_random_start(tiny_model_dir: Path, lora: Lora | None) -> None:
    def load(kind: type, sharded: bool) -> CausalModel | ScalarModel:
        torch.manual_seed(5)
        if kind is CausalModel:
            return load_causal(
                str(tiny_model_dir), dtype=torch.bfloat16, vocab_chunk_tokens=8, lora=lora, sharded=sharded
            )
        return load_scalar(str(tiny_model_dir), dtype=torch.bfloat16, seed=3, lora=lora, sharded=sharded)

    for kind in (CausalModel, ScalarModel):
        mine, theirs = load(kind, sharded=True), load(kind, sharded=False)
        assert mine.stored is not None
        assert theirs.stored is None
        in_memory = {name for name, parameter in mine.named_parameters() if not parameter.is_meta}
        drawn = {name for name, _ in mine.named_parameters() if ".lora_" in name or name == "model.score.weight"}
        assert in_memory == drawn
        assert_same(filled(mine, mine.stored, ranks=2), theirs)


def test_a_trained_scalar_head_is_read(tiny_model_dir: Path, as_reward_model: Callable[[Path], Path]) -> None:
    folder = str(as_reward_model(tiny_model_dir))
    mine = load_scalar(folder, dtype=torch.float32, sharded=True)
    assert mine.model.score.weight.is_meta
    assert mine.stored is not None
    assert_same(filled(mine, mine.stored, ranks=2), load_scalar(folder, dtype=torch.float32))


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_causal(str(folder), dtype=torch.float32, vocab_chunk_tokens=8, sharded=True)
    assert caught.value.model == str(folder)
    return caught.value.reason


@pytest.fixture
def copied(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_pickles_are_refused_with_the_cure(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    reason = refused(copied)
    assert "its weights are pickles (pytorch_model.bin), which are not loaded" in reason
    assert "save_pretrained" in reason


def test_missing_files_and_weights_are_named(copied: Path) -> None:
    change_weights(copied, lambda weights: weights.pop("model.norm.weight"))
    assert "its files lack model.norm.weight" in refused(copied)
    (copied / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(copied)


def test_a_missing_shard_is_named(saved: Callable[..., Path]) -> None:
    folder = saved("tied", 20_000)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(folder)


def test_a_damaged_file_is_named(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert f"{file} is no whole safetensors file" in refused(copied)


def test_other_shapes_than_those_of_the_config_are_refused(copied: Path) -> None:
    change_weights(copied, lambda weights: weights.update({"model.norm.weight": torch.ones(3)}))
    assert "model.norm.weight is [3] in its files, but [" in refused(copied)


def test_quantized_weights_are_refused(copied: Path) -> None:
    change_weights(
        copied,
        lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"].to(torch.float8_e4m3fn)}),
    )
    assert "model.norm.weight is stored as F8_E4M3, which zero_stage: 3 does not load" in refused(copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert "its weights are quantized" in refused(copied)


def test_a_head_that_is_tied_by_config_alone_is_refused(saved: Callable[..., Path]) -> None:
    """transformers would quietly not tie them."""
    folder = saved("tied")
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 1}))
    assert "model.embed_tokens.weight and lm_head.weight differ in its files" in refused(folder)
    change_weights(
        folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    )
    load_causal(str(folder), dtype=torch.float32, vocab_chunk_tokens=8, sharded=True)


def test_a_tied_weight_may_be_stored_under_either_name(saved: Callable[..., Path]) -> None:
    folder = saved("tied")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": weights.pop("model.embed_tokens.weight")}))
    assert_same(filled(*built(folder, torch.float32), 2), theirs)
