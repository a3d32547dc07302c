"""Jobs whose memory and step times are predicted and measured: of several models, ZeRO stages, batches and lengths."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import CORES, ROOT
from benchmarks.random_model import main as write_random_model
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import parse_config
from rlhf_ray.controllers.number_formats import choose_before_start

Raw = dict[str, Any]

SMOLLM = ROOT / "models/smollm2-135m"
# Hidden size, layers, size inside the feed-forward layers; the vocabulary is SmolLM2's.
RANDOM_MODELS = {"33m": (384, 8, 1024), "256m": (1024, 16, 2816)}

_TEXT = "The film begins slowly, and then it finds its own voice. " * 400
_OTHER_TEXT = "Not so good: nobody in it has anything to say, and they say it at length. " * 400


@dataclass(frozen=True)
class Case:
    """One job.

    Attributes:
        model: `135m` is SmolLM2's; the others are random.
        raw: the config, but for paths.
    """

    model: str
    raw: Raw

    def job(self, folder: Path, steps: int) -> Job:
        """The job, with its model and as much data as `steps` need, all of the longest that it allows."""
        raw = json.loads(json.dumps(self.raw))
        model = str(_model(self.model, folder))
        rows = folder / "rows.jsonl"
        if raw["job"] == "ppo":
            raw["policy"]["model"] = raw["critic"]["init_from"] = model
            raw["data"] |= {"prompts": str(rows), "overlong": "truncate"}
            made = [{"prompt": f"{number} {_TEXT}"} for number in range(raw["data"]["prompts_per_step"] * steps)]
            raw["run"] = {"steps": steps}
        else:
            raw["reward" if raw["job"] == "reward_model" else "policy"]["model"] = model
            raw["data"] |= {"train": str(rows), "overlong": "truncate"}
            made = [_row(raw["job"], number) for number in range(raw["data"]["rows_per_step"] * steps)]
            raw["run"] = {}
        raw["run"] |= {"dir": str(folder / "run"), "export": False, "trace": False}
        rows.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        return choose_before_start(parse_config({**raw, "name": "plan-accuracy"})).config


def _row(job: str, number: int) -> dict[str, str]:
    if job == "sft":
        return {"text": f"{number} {_TEXT}"}
    return {"prompt": "Review:", "chosen": f"{number} {_TEXT}", "rejected": f"{number} {_OTHER_TEXT}"}


def _model(name: str, folder: Path) -> Path:
    if name not in RANDOM_MODELS:
        return SMOLLM
    made = folder / name
    if not made.exists():
        hidden, layers, intermediate = RANDOM_MODELS[name]
        write_random_model(made, hidden=hidden, layers=layers, intermediate=intermediate, tokenizer=SMOLLM)
    return made


def _over_rows(
    job: str, model: str, rows: int, tokens: int, *, ranks: int = 1, lora: Raw | None = None, **engine: Any
) -> Case:
    role = "reward" if job == "reward_model" else "policy"
    raw: Raw = {
        "job": job,
        role: {"engine": engine, "lora": lora},
        "data": {"rows_per_step": rows, "max_tokens": tokens},
        "placement": {role: {"ranks": ranks, "cpus": CORES / ranks}},
    }
    return Case(model, raw)


_sft = partial(_over_rows, "sft")


def _ppo(model: str, samples: int, prompt: int, response: int, **engine: Any) -> Case:
    raw = {
        "job": "ppo",
        "policy": {"engine": engine},
        "critic": {"engine": engine},
        "reference": {"engine": {"micro_batch_tokens": engine["micro_batch_tokens"]}},
        "reward": [{"function": "rlhf_ray.rewards.vader:score", "name": "vader"}],
        "rollout": {
            "sampling": {"max_new_tokens": response, "ignore_eos": True},
            "engine": {"max_model_len": prompt + response, "max_num_seqs": samples},
            "shard_samples": 8,
        },
        "data": {"prompts_per_step": samples, "max_prompt_tokens": prompt},
        "placement": {
            "policy": {"cpus": CORES / 4},
            "critic": {"cpus": CORES / 4},
            "rollout": {"cpus": CORES / 2, "threads": CORES},
        },
    }
    return Case(model, raw)


CASES: dict[str, Case] = {
    "sft, 135M, ZeRO-2, 4 x 512": _sft("135m", 8, 512, zero_stage=2, micro_batch_tokens=2048),
    "sft, 135M, ZeRO-2, 1 x 256": _sft("135m", 2, 256, zero_stage=2, micro_batch_tokens=256),
    "sft, 135M, ZeRO-0, 4 x 256": _sft("135m", 8, 256, zero_stage=0, micro_batch_tokens=1024),
    "sft, 135M, float32, ZeRO-1, 2 x 256": _sft("135m", 4, 256, zero_stage=1, micro_batch_tokens=512, dtype="float32"),
    "sft, 135M, ZeRO-3 on 2 ranks, 2 x 512": _sft("135m", 8, 512, ranks=2, zero_stage=3, micro_batch_tokens=1024),
    "sft, 33M, ZeRO-1 on 2 ranks, 2 x 1024": _sft("33m", 8, 1024, ranks=2, zero_stage=1, micro_batch_tokens=2048),
    "sft, 256M, ZeRO-2, checkpointing, 8 x 256": _sft(
        "256m", 8, 256, zero_stage=2, micro_batch_tokens=2048, activation_checkpointing=True
    ),
    "sft, 256M, LoRA, 4 x 256": _sft("256m", 8, 256, lora={"rank": 16}, zero_stage=2, micro_batch_tokens=1024),
    "reward_model, 135M, ZeRO-2, 2 pairs of 256": _over_rows(
        "reward_model", "135m", 4, 256, zero_stage=2, micro_batch_tokens=1024
    ),
    "preference, 33M, ZeRO-2, 4 pairs of 512": _over_rows(
        "preference", "33m", 8, 512, zero_stage=2, micro_batch_tokens=4096
    ),
    "ppo, 135M, ZeRO-2, 16 x 128": _ppo("135m", 16, 64, 64, zero_stage=2, micro_batch_tokens=1024),
    "ppo, 33M, ZeRO-2, 16 x 512": _ppo("33m", 16, 128, 384, zero_stage=2, micro_batch_tokens=4096),
}
"""By what they are, largest micro-batch at the end."""
