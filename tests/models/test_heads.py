import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf_ray.models.heads import (
    ModelError,
    check_tokenizer_matches,
    load_causal,
    load_config,
    load_scalar,
    load_tokenizer,
)
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.models.role_models import ScalarModel
from rlhf_ray.models.tiny import build_tiny_model

FLOAT = torch.float32


def edited(model: Path, folder: Path, **changes: object) -> Path:
    """A copy of a model folder with another config."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_a_missing_folder_is_named_with_the_cure(load: object, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no such folder; `rlhf-ray prepare`") as caught:
        load(missing)  # type: ignore[operator]
    assert caught.value.model == missing
    assert missing in str(caught.value)


@pytest.mark.parametrize("name", ["models/not-there", "runs/not-there/export", "./not-there", "not-there"])
def test_a_relative_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_config(name)


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config.json"):
        load_config(str(tmp_path))


def test_a_folder_without_weights_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = edited(tiny_model_dir, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="can't be loaded") as caught:
        load_causal(str(folder), dtype=FLOAT, vocab_chunk_tokens=16)
    assert caught.value.model == str(folder)


def test_a_folder_without_tokenizer_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = edited(tiny_model_dir, tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="its tokenizer can't be loaded"):
        load_tokenizer(str(folder))


def test_the_tokenizer_of_another_model_is_refused(
    tiny_model_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    check_tokenizer_matches(str(tiny_model_dir), tokenizer)
    small = edited(tiny_model_dir, tmp_path / "small", vocab_size=511)
    with pytest.raises(ModelError, match="token ids up to 511, but its embedding has 511 rows"):
        check_tokenizer_matches(str(small), tokenizer)


def test_soft_capped_logits_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = edited(tiny_model_dir, tmp_path / "m", final_logit_softcapping=30.0)
    with pytest.raises(ModelError, match="final_logit_softcapping in its config is not supported"):
        load_config(str(folder))


def test_a_classifier_of_two_labels_is_no_reward_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = load_config(str(tiny_model_dir))
    config.num_labels = 2
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="it has 2 labels; a reward model has one"):
        load_scalar(str(tmp_path), dtype=FLOAT)


def test_dropout_is_switched_off(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = edited(tiny_model_dir, tmp_path / "m", attention_dropout=0.5)
    assert load_config(str(folder)).attention_dropout == 0.5
    for model in (load_causal(str(folder), dtype=FLOAT, vocab_chunk_tokens=16), load_scalar(str(folder), dtype=FLOAT)):
        model.train()
        assert model.model.config.attention_dropout == 0.0
        assert {layer.self_attn.attention_dropout for layer in model.model.base_model.layers} == {0.0}


def scores(model: ScalarModel) -> torch.Tensor:
    packed = PackedSequences.of([torch.arange(3, 20).int().numpy()], torch.device("cpu"))
    with torch.no_grad():
        return model(packed, torch.arange(17))


def test_a_causal_model_gets_a_seeded_head_over_its_own_body(tiny_model_dir: Path) -> None:
    first, same, other = (load_scalar(str(tiny_model_dir), dtype=FLOAT, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(scores(first), scores(same))
    assert not torch.equal(scores(first), scores(other))
    body = load_causal(str(tiny_model_dir), dtype=FLOAT, vocab_chunk_tokens=16).model.base_model
    for name, parameter in body.named_parameters():
        assert torch.equal(parameter, first.model.base_model.get_parameter(name)), name


def test_the_new_head_has_the_deviation_of_stiennon(tmp_path: Path) -> None:
    wide = build_tiny_model(tmp_path / "wide", hidden=1024, layers=1)
    weight = load_scalar(str(wide), dtype=FLOAT).model.score.weight
    assert weight.std().item() == pytest.approx((1 / 1025) ** 0.5, rel=0.1)


def test_a_saved_reward_model_keeps_its_head(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load_scalar(str(tiny_model_dir), dtype=FLOAT, seed=1)
    model.model.save_pretrained(tmp_path)
    assert torch.equal(scores(load_scalar(str(tmp_path), dtype=FLOAT, seed=2)), scores(model))


def test_the_body_of_a_reward_model_loads_as_a_causal_model_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    load_scalar(str(tiny_model_dir), dtype=FLOAT).model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    back, first = (load_causal(str(path), dtype=FLOAT, vocab_chunk_tokens=16) for path in (tmp_path, tiny_model_dir))
    for (name, mine), theirs in zip(back.named_parameters(), first.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
