"""What is wrong with the model folder of any role is said before Ray starts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    OPTConfig,
    PreTrainedTokenizerBase,
)

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import ConfigError, parse_config
from rlhf_ray.controllers.job import check
from rlhf_ray.models.tiny import build_tiny_model

MakeConfig = Callable[..., Job]


def of_kind(job: str, sections: dict[str, Any]) -> MakeConfig:
    """Makes configs of a job; a keyword replaces a section."""

    def make(**changes: Any) -> Job:
        return parse_config({"job": job, "name": "x"} | sections | changes)

    return make


def rows(prepared: Path, name: str) -> dict[str, Any]:
    files = {part: str(prepared / f"data/{name}_{part}.jsonl") for part in ("train", "eval")}
    return {**files, "rows_per_step": 16, "max_tokens": 128}


@pytest.fixture
def ppo(prepared: Path) -> MakeConfig:
    model = str(prepared / "models/tiny")
    sections = {
        "policy": {"model": model},
        "critic": {"init_from": model},
        "reward": [{"model": f"{model}-reward", "name": "r"}],
        "rollout": {"engine": {"max_model_len": 64}, "sampling": {"max_new_tokens": 16}},
        "data": {"prompts": str(prepared / "data/tiny_prompts.jsonl"), "prompts_per_step": 4},
        "run": {"dir": "runs/x", "steps": 3},
    }
    return of_kind("ppo", sections)


@pytest.fixture
def pairs(prepared: Path) -> MakeConfig:
    sections = {"reward": {"model": str(prepared / "models/tiny")}, "data": rows(prepared, "tiny_pairs")}
    return of_kind("reward_model", sections | {"run": {"dir": "runs/x"}})


@pytest.fixture
def sft(prepared: Path) -> MakeConfig:
    sections = {"policy": {"model": str(prepared / "models/tiny")}, "data": rows(prepared, "tiny_chats")}
    return of_kind("sft", sections | {"run": {"dir": "runs/x"}})


@pytest.fixture
def preference(prepared: Path) -> MakeConfig:
    sections = {"policy": {"model": str(prepared / "models/tiny")}, "data": rows(prepared, "tiny_preferences")}
    return of_kind("preference", sections | {"run": {"dir": "runs/x"}})


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with another vocabulary."""
    return build_tiny_model(tmp_path_factory.mktemp("other") / "model", vocab=400)


def problems_of(config: Job) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(config)
    return caught.value.problems


def changed(model: Path, folder: Path, **config: object) -> Path:
    """A copy of a model folder with another config."""
    shutil.copytree(model, folder)
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | config))
    return folder


def halve(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_damaged_folder_is_named_for_every_role(
    ppo: MakeConfig, pairs: MakeConfig, sft: MakeConfig, prepared: Path, tmp_path: Path
) -> None:
    model, reward = (changed(prepared / "models" / name, tmp_path / name) for name in ("tiny", "tiny-reward"))
    halve(model)
    halve(reward)
    said = "model.safetensors is no whole safetensors file"
    found = problems_of(
        ppo(policy={"model": str(model)}, critic={"init_from": str(model)}, reward=[{"model": str(reward)}])
    )
    assert [problem.partition(":")[0] for problem in found] == [
        "policy.model",
        "reference.from",
        "critic.init_from",
        "reward.0",
    ]
    assert all(said in problem for problem in found)
    for config, path in (
        (pairs(reward={"model": str(model)}), "reward.model"),
        (sft(policy={"model": str(model)}), "policy.model"),
        (sft(policy={"model": str(model), "lora": {"rank": 4}}), "policy.model"),
    ):
        [problem] = problems_of(config)
        assert problem.startswith(f"{path}: ")
        assert said in problem


def test_the_damaged_reference_of_a_preference_job_is_named(
    preference: MakeConfig, prepared: Path, tmp_path: Path
) -> None:
    model = changed(prepared / "models/tiny", tmp_path / "m")
    halve(model)
    [problem] = problems_of(preference(reference={"from": str(model)}))
    assert problem.startswith("reference.from: ")
    assert "is no whole safetensors file" in problem
    [problem] = problems_of(preference(policy={"model": str(model)}, reference={"from": str(prepared / "models/tiny")}))
    assert problem.startswith("policy.model: ")


def with_positions(kind: str, tokenizer: PreTrainedTokenizerBase, positions: int, folder: Path) -> tuple[Path, Path]:
    """A causal model of a kind that has a table of positions, and a reward model of it."""
    made = {
        "gpt2": GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=positions),
        "opt": OPTConfig(
            vocab_size=512,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=positions,
            word_embed_proj_dim=32,
        ),
    }[kind]
    made.pad_token_id = tokenizer.pad_token_id
    folders = (folder / "causal", folder / "reward")
    made.num_labels = 1
    for auto, target in zip((AutoModelForCausalLM, AutoModelForSequenceClassification), folders, strict=True):
        auto.from_config(made).save_pretrained(target)
        tokenizer.save_pretrained(target)
    return folders


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_table_of_positions_must_hold_prompt_and_response(
    kind: str, ppo: MakeConfig, prepared: Path, tmp_path: Path
) -> None:
    policy = str(prepared / "models/tiny")
    causal, reward = with_positions(kind, AutoTokenizer.from_pretrained(policy), 63, tmp_path)
    short = {
        "reference": {"from": str(causal)},
        "critic": {"init_from": str(causal)},
        "reward": [{"model": str(reward)}],
    }
    said = "has positions for 63 tokens, but a prompt of up to 48 and a response of up to 16 have 64"
    found = problems_of(ppo(**short))
    assert [problem.partition(":")[0] for problem in found] == ["reference.from", "critic.init_from", "reward.0.model"]
    assert all(said in problem for problem in found)
    assert check(ppo(**short, data={**ppo().data.model_dump(exclude_unset=True), "max_prompt_tokens": 47}))
    found = problems_of(ppo(policy={"model": str(causal)}))
    assert found[0].startswith("rollout.engine.max_model_len (64) is more than the 63 positions of policy.model")


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_table_of_positions_must_hold_the_longest_row(
    kind: str,
    pairs: MakeConfig,
    sft: MakeConfig,
    preference: MakeConfig,
    prepared: Path,
    tmp_path: Path,
) -> None:
    own = AutoTokenizer.from_pretrained(prepared / "models/tiny")
    causal, _ = (str(path) for path in with_positions(kind, own, 128, tmp_path))
    for make, section, path in (
        (pairs, {"reward": {"model": causal}}, "reward.model"),
        (sft, {"policy": {"model": causal}}, "policy.model"),
        (preference, {"policy": {"model": causal}}, "policy.model"),
        (preference, {"reference": {"from": causal}}, "reference.from"),
    ):
        data = make().data.model_dump(exclude_unset=True)
        assert check(make(**section, data={**data, "max_tokens": 128}))
        [problem] = problems_of(make(**section, data={**data, "max_tokens": 129}))
        assert problem.startswith(f"{path}: model {causal!r} has positions for 128 tokens, but data.max_tokens is 129")


def test_rotary_positions_go_on_with_a_warning(
    sft: MakeConfig, prepared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = sft().data.model_dump(exclude_unset=True)
    check(sft(data={**data, "max_tokens": 513}))
    assert "has positions for 512 tokens, but data.max_tokens is 513" in caplog.text


def test_an_embedding_too_small_for_the_policys_tokens_is_named(
    ppo: MakeConfig, prepared: Path, as_reward_model: Callable[[Path], Path], other_model: Path, tmp_path: Path
) -> None:
    """A folder of another model's weights with the policy's tokenizer."""
    short, scorer = tmp_path / "short", tmp_path / "scorer"
    shutil.copytree(other_model, short)
    shutil.copytree(as_reward_model(other_model), scorer)
    for folder in (short, scorer):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(prepared / "models/tiny" / name, folder)
    found = problems_of(
        ppo(reference={"from": str(short)}, critic={"init_from": str(short)}, reward=[{"model": str(scorer)}])
    )
    assert [problem.partition(":")[0] for problem in found] == ["reference.from", "critic.init_from", "reward.0"]
    assert all("token ids up to 511, but its embedding has 400 rows" in problem for problem in found)


def test_what_an_export_would_fail_with_is_found_first(
    sft: MakeConfig, prepared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = changed(prepared / "models/tiny", tmp_path / "m")
    (model / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    check(sft(policy={"model": str(model)}))
    assert "its generation_config.json goes into exports as it is" in caplog.text
    (model / "generation_config.json").write_text('{"max_new_tokens": 0}')
    [problem] = problems_of(sft(policy={"model": str(model)}))
    assert "its generation_config.json can't be read (`max_new_tokens` must be greater than 0" in problem
