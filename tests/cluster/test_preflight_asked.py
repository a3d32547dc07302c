"""What a config asks of the nodes: paths, room for checkpoints, traffic."""

import json
from pathlib import Path
from typing import Any

import pytest

from on_bfloat16 import on_bfloat16
from rlhf_ray.cluster.named_paths import Named, named_in
from rlhf_ray.cluster.preflight.asked import (
    Transfer,
    compiled_optimizers,
    describe_bytes,
    disk_need,
    modules_and_variables,
    transfers,
)
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import parse_config
from rlhf_ray.models.config_json import read_shape


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Nothing but a config.json: 10 parameters in a norm, and so on; `read_shape` counts them."""
    llama = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 32,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(llama))
    return str(tmp_path)


def ppo(model: str, **sections: Any) -> Job:
    config = {
        "job": "ppo",
        "name": "a",
        "policy": {"model": model},
        "reward": [{"model": model}, {"function": "mine.rewards:f"}, {"url": "http://h/s", "token_env": "SCORER"}],
        "data": {"prompts": "rows.jsonl", "prompts_per_step": 4},
        "rollout": {"sampling": {"max_new_tokens": 8}, "engine": {"max_model_len": 32}},
        "run": {"dir": "/runs/a", "steps": 5},
    }
    for name, section in sections.items():
        config[name] = {**config[name], **section} if isinstance(config.get(name), dict) else section  # type: ignore[dict-item]
    return on_bfloat16(parse_config(config))


def test_a_model_is_named_once_for_each_role_that_loads_it(model: str) -> None:
    named = [(each.setting, each.role) for each in named_in(ppo(model)) if each.kind == "model"]
    assert named == [
        ("policy.model", "policy"),
        ("reward.0.model", "critic"),
        ("policy.model", "reference"),
        ("reward.0.model", "reward"),
        ("policy.model", "rollout"),
    ]
    own = ppo(model, critic={"init_from": "/c"}, reference={"from": "/r"})
    named = [(each.setting, each.role) for each in named_in(own) if each.kind == "model"]
    assert ("critic.init_from", "critic") in named
    assert ("reference.from", "reference") in named


def test_scratch_folders_are_named_with_the_role_that_writes_them(model: str) -> None:
    engine = {"zero_stage": 3, "offload_parameters": "nvme", "nvme_path": "/nvme"}
    named = [each for each in named_in(ppo(model, policy={"engine": engine})) if each.kind == "scratch"]
    assert named == [Named("policy.engine.nvme_path", "/nvme", "scratch", "policy")]


def test_checkpoints_hold_weights_master_weights_and_two_moments(model: str) -> None:
    policy = read_shape(model).parameters
    critic = read_shape(model).with_head("scalar").parameters
    need = disk_need(ppo(model))
    assert need.size == (policy + critic) * (2 + 12) + policy * 2, "one checkpoint at the end, one export"
    need = disk_need(ppo(model, run={"checkpoint_every": 1, "keep_last": 2, "export": False}))
    assert need.size == 3 * (policy + critic) * (2 + 12), "the third is complete before the first goes"
    assert need.what.startswith("3 checkpoints of ")


def test_no_more_checkpoints_are_counted_than_a_run_writes(model: str) -> None:
    every_step = disk_need(ppo(model, run={"checkpoint_every": 1, "keep_last": 9, "steps": 2}))
    assert every_step.what.startswith("2 checkpoints of ")


def test_adapters_are_all_that_a_checkpoint_has_of_a_model(model: str) -> None:
    lora = {"rank": 2, "targets": ["q_proj"]}
    config = ppo(model, policy={"lora": lora}, run={"export": False})
    critic = read_shape(model).with_head("scalar").parameters
    adapters = 2 * (2 * (8 + 8))  # two layers, rank times in and out
    assert disk_need(config).size == (adapters + critic) * (2 + 12)


def test_weights_and_gradients_are_what_travels(model: str) -> None:
    policy, critic = read_shape(model).parameters, read_shape(model).with_head("scalar").parameters
    assert list(transfers(ppo(model, run={"timeouts": {"sync_s": 7.0, "update_s": 9.0}}))) == [
        Transfer("one weight sync", 2 * policy, 7.0, "run.timeouts.sync_s"),
        Transfer("one reduction of the policy's gradients", 4 * policy, 9.0, "run.timeouts.update_s"),
        Transfer("one reduction of the critic's gradients", 4 * critic, 9.0, "run.timeouts.update_s"),
    ]


def test_modules_and_variables_are_those_of_the_rewards(model: str) -> None:
    assert modules_and_variables(ppo(model)) == (
        {"reward.1.function": "mine.rewards"},
        {"reward.2.token_env": "SCORER"},
    )


@pytest.mark.parametrize(
    ("size", "shown"), [(12_345_678_900, "12.3 GB"), (1_250_000_000, "1.25 GB"), (269_000_000, "269 MB"), (0, "0 MB")]
)
def test_sizes_are_told_in_words(size: int, shown: str) -> None:
    assert describe_bytes(size) == shown


def test_only_optimizers_in_host_memory_are_compiled(model: str) -> None:
    assert compiled_optimizers(ppo(model)) == {}
    found = compiled_optimizers(ppo(model, critic={"engine": {"offload_optimizer": "cpu"}}))
    assert found == {"critic": "critic.engine.offload_optimizer"}
