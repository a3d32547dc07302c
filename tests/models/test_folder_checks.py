"""What is wrong with a model folder is found from its config and the headers of its files, before it is loaded."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, LlamaConfig, MixtralConfig, OPTConfig

from rlhf_ray.models.folder_checks import Positions, check_model, positions_of, try_export
from rlhf_ray.models.heads import ModelError, load_causal, load_config, load_scalar, load_tokenizer
from rlhf_ray.models.saving import save_model
from rlhf_ray.models.score_scale import scale_of
from rlhf_ray.models.stored_weights import check_finite_files

FLOAT = torch.float32


@pytest.fixture
def copied(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def configure(folder: Path, text: str | None = None, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes) if text is None else text)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refused(folder: Path, *, scalar: bool = False, sharded: bool = False) -> str:
    with pytest.raises(ModelError) as caught:
        check_model(str(folder), scalar=scalar, sharded=sharded)
    assert caught.value.model == str(folder)
    assert "\n" not in caught.value.reason
    return caught.value.reason


BROKEN_CONFIGS = {
    "a list": ("[]", "holds a list, not an object"),
    "a number": ("3", "holds a number, not an object"),
    "null": ("null", "holds null, not an object"),
    "a text": ('"llama"', "holds text, not an object"),
    "cut": ('{"model_type": ', "can't be read as JSON"),
    "nested without end": ("[" * 100_000, "can't be read as JSON"),
}
WRONG_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "a word for a size": ({"hidden_size": "big"}, "hidden_size"),
    "a word for the vocabulary": ({"vocab_size": "many"}, "vocab_size"),
    "a word for the labels": ({"num_labels": "two"}, "its config can't be loaded"),
    "half a head": ({"num_attention_heads": 2.5}, "num_attention_heads"),
    "no heads": ({"num_attention_heads": 0}, "its config can't be loaded"),
    "fewer layers than none": ({"num_hidden_layers": -1}, "num_hidden_layers in its config.json is -1"),
    "layers without end": ({"num_hidden_layers": 10**12}, "num_hidden_layers in its config.json is 1000000000000"),
    "true": ({"vocab_size": True}, "vocab_size"),
    "an unknown type": ({"model_type": "nope"}, "nope"),
    "a list for the type": ({"model_type": [1]}, "its config can't be loaded"),
    "a number for the architectures": ({"architectures": 3}, "architectures in its config.json is 3"),
    "an unknown dtype": ({"dtype": "float7"}, "float7"),
    "sizes that do not go together": ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "nope"),
}


@pytest.mark.parametrize("kind", BROKEN_CONFIGS)
def test_a_config_that_is_no_object_is_refused(kind: str, copied: Path) -> None:
    text, said = BROKEN_CONFIGS[kind]
    configure(copied, text)
    assert said in refused(copied)


@pytest.mark.parametrize("kind", WRONG_VALUES)
def test_a_config_with_a_wrong_value_is_refused(kind: str, copied: Path) -> None:
    changes, said = WRONG_VALUES[kind]
    configure(copied, **changes)
    reason = refused(copied)
    assert said in reason
    assert len(reason) < 1000


def test_a_tokenizer_that_cannot_be_read_is_refused(copied: Path) -> None:
    (copied / "tokenizer.json").write_text('{"model": []}')
    with pytest.raises(ModelError, match="its tokenizer can't be loaded"):
        load_tokenizer(str(copied))


def test_a_scale_that_is_no_number_is_refused(copied: Path) -> None:
    configure(copied, score_mean="high", score_std=1.0)
    with pytest.raises(ModelError, match="score_mean and score_std in its config.json are 'high' and 1.0"):
        scale_of(str(copied))


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_good_folder_passes(tiny_model_dir: Path, scalar: bool, sharded: bool) -> None:
    check_model(str(tiny_model_dir), scalar=scalar, sharded=sharded)
    try_export(str(tiny_model_dir), scalar=scalar)


SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, tie_word_embeddings=False),
        GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4),
        MixtralConfig(**SIZES, num_local_experts=3),
    ],
    ids=["untied", "without prefix", "stacked experts"],
)
def test_every_tensor_that_is_taken_away_is_missed(config: Any, tmp_path: Path) -> None:
    """But for those that are tied to another."""
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    check_model(str(tmp_path), scalar=False, sharded=False)
    whole = load_file(tmp_path / "model.safetensors")
    for name in whole:
        save_file({key: tensor for key, tensor in whole.items() if key != name}, tmp_path / "model.safetensors")
        reason = refused(tmp_path)
        assert "its files lack" in reason or "is made of" in reason, name


def test_a_scalar_head_is_drawn_for_a_causal_model_alone(
    copied: Path, tiny_model_dir: Path, as_reward_model: Callable[[Path], Path], tmp_path: Path
) -> None:
    check_model(str(copied), scalar=True, sharded=False)
    reward = Path(shutil.copytree(as_reward_model(tiny_model_dir), tmp_path / "reward"))
    change_weights(reward, lambda weights: weights.pop("score.weight"))
    assert "its files lack score.weight" in refused(reward, scalar=True)
    with pytest.raises(ModelError, match=r"its files lack score\.weight"):
        load_scalar(str(reward), dtype=FLOAT)


def test_the_faults_of_files_are_named(copied: Path) -> None:
    file = copied / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert f"{file} is no whole safetensors file" in refused(copied)
    file.write_bytes(struct.pack("<Q", 2**40) + whole[8:])
    assert f"{file} is no whole safetensors file" in refused(copied)
    file.write_bytes(b"")
    assert f"{file} is no whole safetensors file" in refused(copied)
    file.write_bytes(whole)
    change_weights(copied, lambda weights: weights.update({"model.norm.weight": torch.ones(3)}))
    assert "model.norm.weight is [3] in its files, but [64] by its config" in refused(copied)
    file.rename(copied / "pytorch_model.bin")
    assert "its weights are pickles (pytorch_model.bin), which are not loaded" in refused(copied)
    (copied / "pytorch_model.bin").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(copied)


def test_the_faults_of_an_index_are_named(copied: Path) -> None:
    AutoModelForCausalLM.from_pretrained(copied).save_pretrained(copied, max_shard_size=40_000)
    (copied / "model.safetensors").unlink()
    check_model(str(copied), scalar=False, sharded=False)
    second = sorted(copied.glob("model-*.safetensors"))[1]
    second.rename(copied / "elsewhere")
    assert second.name in refused(copied)
    (copied / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json is no index of weights" in refused(copied)


def test_a_head_with_a_bias_and_several_labels_are_found_before_loading(copied: Path) -> None:
    configure(copied, architectures=["LlamaForSequenceClassification"], num_labels=2)
    assert "it has 2 labels; a reward model has one" in refused(copied, scalar=True)
    configure(copied, quantization_config={"quant_method": "fp8"})
    assert "its weights are quantized, which zero_stage: 3 does not load" in refused(copied, sharded=True)


@pytest.mark.parametrize("load", [load_causal, load_scalar])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_named_with_tensor_and_file(load: Any, value: float, copied: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    change_weights(copied, spoil)
    check_model(str(copied), scalar=load is load_scalar, sharded=False)  # no tensor is read
    more = {"vocab_chunk_tokens": 8} if load is load_causal else {}
    with pytest.raises(ModelError) as caught:
        load(str(copied), dtype=torch.bfloat16, **more)
    file = copied / "model.safetensors"
    said = f"model.layers.1.mlp.up_proj.weight in {file} holds NaN or infinity: the copy is damaged or the run that"
    assert said in caught.value.reason
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        check_finite_files(str(copied))


def test_finite_files_pass(copied: Path) -> None:
    check_finite_files(str(copied))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=40), Positions(40, in_table=True)),
        (
            OPTConfig(
                vocab_size=64,
                hidden_size=32,
                ffn_dim=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=40,
                word_embed_proj_dim=32,
            ),
            Positions(40, in_table=True),
        ),
        (LlamaConfig(**SIZES, max_position_embeddings=40), Positions(40, in_table=False)),
    ],
    ids=["gpt2", "opt", "llama"],
)
def test_positions_in_a_table_are_told_from_rotary_ones(config: Any, expected: Positions, tmp_path: Path) -> None:
    """The last position that the table has works, the next one does not."""
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert positions_of(str(tmp_path)) == expected
    model(torch.zeros(1, 40, dtype=torch.int64))
    if expected.in_table:
        with pytest.raises(IndexError):
            model(torch.zeros(1, 41, dtype=torch.int64))


def test_a_generation_config_that_transformers_refuses_to_save_is_carried_over(copied: Path, tmp_path: Path) -> None:
    own = {"temperature": 0.9, "top_p": 0.6, "max_new_tokens": 77}
    (copied / "generation_config.json").write_text(json.dumps(own))
    model = load_causal(str(copied), dtype=FLOAT, vocab_chunk_tokens=8).model
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path / "theirs")
    save_model(model, tmp_path / "ours")
    written = json.loads((tmp_path / "ours/generation_config.json").read_text())
    assert {key: written[key] for key in own} == own
    assert model.generation_config.temperature == 0.9
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=FLOAT)
    for (name, mine), theirs in zip(back.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    try_export(str(copied), scalar=False)


def test_a_valid_generation_config_is_saved_as_transformers_does(copied: Path, tmp_path: Path) -> None:
    GenerationConfig(temperature=0.9, do_sample=True).save_pretrained(copied)
    model = load_causal(str(copied), dtype=FLOAT, vocab_chunk_tokens=8).model
    model.save_pretrained(tmp_path / "theirs")
    save_model(model, tmp_path / "ours")
    for file in (tmp_path / "theirs").iterdir():
        assert file.read_bytes() == (tmp_path / "ours" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("text", ["[]", "{", '{"max_new_tokens": 0}'])
def test_a_generation_config_that_cannot_be_read_is_refused(text: str, copied: Path) -> None:
    (copied / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"its generation_config\.json can't be read"):
        try_export(str(copied), scalar=False)


def test_an_export_that_would_fail_is_named(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = type(load_tokenizer(str(copied)))

    def fails(self: Any, folder: Any) -> None:
        raise OSError("no such vocabulary")

    monkeypatch.setattr(tokenizer, "save_pretrained", fails)
    with pytest.raises(ModelError, match=r"could not be exported \(no such vocabulary\)"):
        try_export(str(copied), scalar=False)


def test_a_config_is_read_without_its_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert load_config(str(copied)).vocab_size == 512
