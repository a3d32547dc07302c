"""Runs that train adapters: what they learn, what they leave behind, and how they go on."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_ray.config.jobs import RewardModelJob, SFTJob
from rlhf_ray.controllers.train import train
from rlhf_ray.recovery.convert import export_checkpoint
from rlhf_ray.telemetry.metrics import read_metrics
from runs import assert_same_run, exported_weights

IDS = torch.arange(3, 40)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=IDS).logits
    return out


def assert_export_is_base_and_adapter(export: Path, base: Path, auto: Any, **settings: Any) -> None:
    """The merged model loads without peft, and the adapter with it on the base model, as the same model."""
    merged = auto.from_pretrained(export, dtype=torch.float32)
    assert not [name for name in merged.state_dict() if "lora_" in name or "base_layer" in name]
    start = auto.from_pretrained(base, dtype=torch.float32, **settings)
    before = logits(start)
    adapted = PeftModel.from_pretrained(start, export / "adapter")
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=0, atol=1e-5)
    assert (logits(merged) - before).abs().max() > 1e-2, "it has learned something"


def assert_same_export(found: Path, wanted: Path) -> None:
    for file in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (found / file).read_bytes() == (wanted / file).read_bytes(), file


def saved_names(checkpoint: Path) -> set[str]:
    """Weights in a checkpoint of one rank, stages 0 to 2."""
    return set(torch.load(checkpoint / "state/mp_rank_00_model_states.pt", weights_only=True)["module"])


def test_fine_tuning_with_adapters(sft_config: Callable[..., SFTJob], tiny: Path, tmp_path: Path) -> None:
    settings = ("policy.lora={rank: 8}", "policy.optimizer.lr=0.01", "run.checkpoint_every=3", "run.keep_last=9")
    run = train(sft_config(tmp_path / "run", *settings))
    rows = read_metrics(run)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.3
    assert_export_is_base_and_adapter(run / "export", tiny / "models/tiny", AutoModelForCausalLM)
    exported = export_checkpoint(run, tmp_path / "exported")
    assert exported.adapter == tmp_path / "exported/adapter"
    assert_same_export(tmp_path / "exported", run / "export")

    names = saved_names(run / "checkpoints/step_000006/policy")
    assert len(names) == 2 * 7 * 2
    assert all("lora_" in name for name in names), "a checkpoint has the adapters alone"

    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    shutil.rmtree(stopped / "export")
    shutil.rmtree(stopped / "checkpoints/step_000006")
    train(sft_config(stopped, *settings))
    assert_same_run(stopped, run)


def test_a_reward_model_with_adapters_on_two_sharded_ranks(
    reward_config: Callable[..., RewardModelJob], tiny: Path, tmp_path: Path
) -> None:
    settings = (
        "reward.lora={rank: 8, targets: [q_proj, v_proj, down_proj]}",
        "reward.optimizer.lr=0.01",
        "reward.engine.zero_stage=3",
        "placement.reward.ranks=2",
        "run.checkpoint_every=4",
    )
    run = train(reward_config(tmp_path / "run", *settings))
    assert read_metrics(run)[-1]["train/accuracy"] > 0.9
    assert_export_is_base_and_adapter(
        run / "export", tiny / "models/tiny", AutoModelForSequenceClassification, num_labels=1
    )
    export_checkpoint(run, tmp_path / "exported")
    assert_same_export(tmp_path / "exported", run / "export")
    base, merged = exported_weights(tiny / "models/tiny"), exported_weights(run / "export")
    assert merged.keys() - base.keys() == {"score.weight"}
    changed = {name.split(".")[-2] for name, tensor in base.items() if not torch.equal(tensor, merged[name])}
    assert changed == {"q_proj", "v_proj", "down_proj"}
