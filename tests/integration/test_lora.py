"""Runs that train adapters: what they learn, what they leave behind, and how they go on."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from policy_surgery import change_trained, whole_weights
from rlhf_ray.actors.columns import assemble
from rlhf_ray.actors.group import Calls
from rlhf_ray.actors.policy import PolicyWorker
from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.config.jobs import PPOJob, RewardModelJob, SFTJob
from rlhf_ray.config.number_formats import NumberFormats
from rlhf_ray.config.run import Limit, Timeouts
from rlhf_ray.controllers.inputs import PPOInputs
from rlhf_ray.controllers.job import check
from rlhf_ray.controllers.ppo import PPOController
from rlhf_ray.controllers.ppo_roles import PPORoles, start_ppo_roles
from rlhf_ray.controllers.roles import Actors
from rlhf_ray.controllers.run_folder import Checkpointing, RunFolder
from rlhf_ray.controllers.train import train
from rlhf_ray.data.columns import ColumnPart
from rlhf_ray.data.cursor import PromptCursor
from rlhf_ray.data.requests import requests_for
from rlhf_ray.data.trajectory import TrajectoryBatch
from rlhf_ray.models.heads import load_causal
from rlhf_ray.models.responses import ResponsePack
from rlhf_ray.recovery.convert import export_checkpoint
from rlhf_ray.telemetry.metrics import read_metrics
from runs import MakeConfig, assert_nothing_is_left, assert_same_run, exported_weights
from sampling import as_shard, generated, greedy

IDS = torch.arange(3, 40)[None]
LIMIT = Limit(60.0, "no setting: a test")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(input_ids=IDS).logits
    return out


def assert_export_is_base_and_adapter(export: Path, base: Path, auto: Any, **settings: Any) -> None:
    """The merged model loads without peft, and the adapter with it on the base model, as the same model."""
    merged = auto.from_pretrained(export, dtype=torch.float32)
    assert not [name for name in merged.state_dict() if "lora_" in name or "base_layer" in name]
    start = auto.from_pretrained(base, dtype=torch.float32, **settings)
    adapted = PeftModel.from_pretrained(start, export / "adapter")
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=0, atol=1e-4)
    learnt = [weight for name, weight in adapted.named_parameters() if "lora_B" in name]  # they begin as zeros
    assert all(weight.any() for weight in learnt), "it has learned something"
    assert learnt


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


@pytest.fixture(scope="module", params=["merged", "adapters"])
def config(
    request: pytest.FixtureRequest, ppo_config: MakeConfig, wide_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> PPOJob:
    """A PPO run with adapters: merged by two sharded ranks for one engine, or as they are for two engines."""
    ranks, stage, engines = (2, 3, 1) if request.param == "merged" else (1, 2, 2)
    return ppo_config(
        tmp_path_factory.mktemp(request.param) / "run",
        f"policy.model={wide_model}",
        "policy.lora={rank: 12, alpha: 24}",
        "policy.optimizer.lr=0.01",
        f"policy.engine.zero_stage={stage}",
        "policy.engine.micro_batch_tokens=128",
        f"placement.policy.ranks={ranks}",
        "reference={}",
        f"critic.init_from={wide_model}",
        "critic.lora={rank: 4}",
        "reward=[{function: reward_functions:letters, name: letters}]",
        f"rollout.lora_sync={request.param}",
        "rollout.sync_bucket_mib=1",
        f"placement.rollout.engines={engines}",
        "placement.rollout.cpus=0.5",
        "run.steps=2",
        "run.tensorboard=false",
    )


@pytest.fixture(scope="module")
def inputs(config: PPOJob) -> PPOInputs:
    inputs = check(config)
    assert isinstance(inputs, PPOInputs)
    return inputs


@pytest.fixture(scope="module")
def roles(config: PPOJob, inputs: PPOInputs) -> Iterator[PPORoles]:
    with Actors.of_job(config) as actors:
        yield start_ppo_roles(config, inputs, actors)
    assert_nothing_is_left()


def on_policy(roles: PPORoles, function: Any, *arguments: Any) -> Any:
    """What rank 0 makes of a function that all ranks of the policy run."""
    refs = [actor.__ray_call__.remote(function, *arguments) for actor in roles.policy.actors]
    return wait_all(refs, 60, "a test", "")[0]


def test_a_ppo_run_with_adapters(config: PPOJob, inputs: PPOInputs, roles: PPORoles) -> None:
    assert roles.reference is None
    folder = RunFolder(config, config.run.steps, NumberFormats(config, ()))
    folder.start_progress()
    assert roles.critic is not None
    trained = {"policy": roles.policy, "critic": roles.critic}
    checkpointing = Checkpointing(folder, trained, Timeouts(checkpoint_s=60.0))
    with folder:
        PPOController(config, inputs, roles, folder, checkpointing).train()
    first, second = read_metrics(folder.path)
    assert first["kl/mean"] == 0, "a new adapter changes nothing"
    assert second["kl/mean"] > 0.01
    for row in (first, second):
        assert row["mismatch/logprob_abs_mean"] <= 1e-4
        assert row["staleness/mean"] == 0
    assert_export_is_base_and_adapter(folder.path / "export", Path(config.policy.model), AutoModelForCausalLM)
    whole = on_policy(roles, whole_weights)
    for name, tensor in exported_weights(folder.path / "export").items():
        assert torch.equal(tensor, whole[name]), name


def test_after_a_sync_every_engine_samples_from_the_trainers_model(
    config: PPOJob, inputs: PPOInputs, roles: PPORoles
) -> None:
    engines = config.placement.rollout.engines
    tickets = PromptCursor(len(inputs.prompts), 0, True).take(6)
    requests = requests_for(inputs.prompts, tickets, 1, run_seed=0)
    before: list[list[int]] = []
    for version in (10, 11):
        changed = on_policy(roles, change_trained, version)
        roles.policy.send_weights(version).wait(LIMIT)
        wanted = greedy(on_policy(roles, whole_weights), config.policy.model, requests)
        assert wanted != before, "the change must show, else the test proves nothing"
        before = wanted
        for engine in range(engines):
            batch = generated(roles, engine, requests, version)
            assert [batch.response(sample).tolist() for sample in range(len(batch))] == wanted, f"engine {engine}"
            assert set(batch.weight_versions.tolist()) == {version}
            trainers = column(roles.policy.call(PolicyWorker.logprobs, ray.put(batch)), batch)
            assert np.abs(batch.engine_logprobs - trainers).max() <= 1e-4, f"engine {engine}"
    assert changed == 2 * 7 * 2
    assert roles.rollout.versions().wait(LIMIT) == [version] * engines


def test_the_reference_is_the_model_before_training(config: PPOJob, inputs: PPOInputs, roles: PPORoles) -> None:
    requests = requests_for(inputs.prompts, PromptCursor(len(inputs.prompts), 0, True).take(6), 1, run_seed=0)
    batch = generated(roles, 0, requests, version=11)
    found = column(roles.reference_logprobs(as_shard(batch)), batch)
    base = load_causal(config.policy.model, dtype=torch.float32, vocab_chunk_tokens=64)
    pack = ResponsePack.of(batch, range(len(batch)), torch.device("cpu"))
    with torch.no_grad():
        wanted = base(pack.packed, pack.positions, pack.targets, 1.0)[0]
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-5)
    assert np.abs(column(roles.policy.call(PolicyWorker.logprobs, ray.put(batch)), batch) - found).max() > 0.1


def column(parts: Calls[ColumnPart], batch: TrajectoryBatch) -> np.ndarray:
    return assemble(parts.wait(LIMIT), batch).numpy()
