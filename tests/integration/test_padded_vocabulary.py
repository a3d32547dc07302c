"""A policy whose embedding has more rows than its tokenizer has tokens, beside roles that have no such rows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.config.loading import load_config
from rlhf_ray.controllers.train import train
from rlhf_ray.telemetry.metrics import read_metrics
from runs import exported_weights

ROWS = 64


@pytest.fixture
def padded(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model with rows that no token has, which its head likes better than those of tokens, and with a
    generation config that transformers refuses to save."""
    folder = Path(shutil.copytree(tiny / "models/tiny", tmp_path / "padded"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(len(tokens) + ROWS, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[len(tokens) :] = 2 * tokens[:ROWS]
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    return folder


def test_no_id_without_a_token_is_sampled_or_counted(
    tiny: Path, padded: Path, as_reward_model: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Reference, critic and reward model would die of such an id, and log-probs of the two sides would differ."""
    narrow = as_reward_model(tiny / "models/tiny")
    config = load_config(
        Path(__file__).parents[2] / "configs/tiny.yaml",
        [
            f"policy.model={padded}",
            f"reference.from={tiny}/models/tiny",
            f"reward.0.model={narrow}",
            f"data.prompts={tiny}/data/tiny_prompts.jsonl",
            "rollout.sampling.ignore_eos=true",
            "run.steps=2",
            "run.checkpoint_every=0",
            f"run.dir={tmp_path}/run",
        ],
    )
    folder = train(config)
    rows = read_metrics(folder)
    assert len(rows) == 2
    for row in rows:
        assert row["mismatch/logprob_abs_mean"] <= 1e-4
    assert abs(rows[0]["kl/mean"]) < 1e-4  # of the tokens alone the policy is the reference
    weights = exported_weights(folder / "export")
    assert len(weights["model.embed_tokens.weight"]) == 512 + ROWS
    settings = json.loads((folder / "export/generation_config.json").read_text())
    assert (settings["temperature"], settings["top_p"]) == (0.9, 0.6)
