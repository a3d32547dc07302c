"""Jobs to plan for, whose models are public ones or folders with a config.json alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from on_bfloat16 import on_bfloat16
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import apply_override, parse_config

MakeJob = Callable[..., Any]

LLAMA_8B = "meta-llama/Meta-Llama-3-8B"

PPO: dict[str, Any] = {
    "job": "ppo",
    "name": "planned",
    "policy": {"model": LLAMA_8B, "engine": {"micro_batch_tokens": 8192}},
    "critic": {"engine": {"micro_batch_tokens": 8192}},
    "reward": [{"model": LLAMA_8B, "name": "scores"}],
    "rollout": {
        "sampling": {"max_new_tokens": 1024},
        "engine": {"max_model_len": 2048},
        "shard_samples": 16,
    },
    "data": {"prompts": "prompts.jsonl", "prompts_per_step": 128},
    "placement": {
        "policy": {"ranks": 2, "gpus": 1},
        "critic": {"ranks": 2, "gpus": 1},
        "rollout": {"engines": 4, "gpus": 1},
    },
    "run": {"steps": 10, "dir": "runs/planned"},
}
SFT: dict[str, Any] = {
    "job": "sft",
    "name": "planned",
    "policy": {"model": LLAMA_8B, "engine": {"micro_batch_tokens": 4096}},
    "data": {"train": "rows.jsonl", "rows_per_step": 64, "max_tokens": 2048},
    "placement": {"policy": {"ranks": 8, "gpus": 1}},
    "run": {"dir": "runs/planned"},
}
REWARD: dict[str, Any] = {
    "job": "reward_model",
    "name": "planned",
    "reward": {"model": LLAMA_8B},
    "data": {"train": "rows.jsonl", "rows_per_step": 64, "max_tokens": 2048},
    "placement": {"reward": {"ranks": 8, "gpus": 1}},
    "run": {"dir": "runs/planned"},
}
PREFERENCE: dict[str, Any] = {
    "job": "preference",
    "name": "planned",
    "policy": {"model": LLAMA_8B, "engine": {"micro_batch_tokens": 4096}},
    "data": {"train": "rows.jsonl", "rows_per_step": 64, "max_tokens": 2048},
    "placement": {"policy": {"ranks": 8, "gpus": 1}},
    "run": {"dir": "runs/planned"},
}
JOBS = {"ppo": PPO, "sft": SFT, "reward_model": REWARD, "preference": PREFERENCE}


@pytest.fixture
def make_job() -> MakeJob:
    """A job of this type with these overrides, each `key=value`."""

    def make(kind: str, *overrides: str) -> Job:
        raw = copy.deepcopy(JOBS[kind])
        for override in overrides:
            apply_override(raw, override)
        return on_bfloat16(parse_config(raw))

    return make
