"""`rlhf-ray export` on checkpoints in DeepSpeed's format; integration tests have real ones of each ZeRO stage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from typer.testing import Result

from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.config.training import Lora
from rlhf_ray.models.heads import load_causal, load_scalar
from rlhf_ray.models.score_scale import ScoreScale, scale_of, write_scale
from rlhf_ray.recovery.checkpoints import CheckpointStore

REPOSITORY = Path(__file__).parents[2]

RunCli = Callable[..., Result]
Weights = dict[str, torch.Tensor]


@pytest.fixture
def ppo_run(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Folder of a PPO run on the tiny model, without checkpoints."""
    return make_run(tmp_path / "run", "tiny", tiny_model_dir)


def make_run(run_dir: Path, config: str, model: Path, *overrides: str) -> Path:
    models = ["policy.model", "reward.0.model"] if config == "tiny" else ["reward.model"]
    own = [f"{key}={model}" for key in models]
    run_dir.mkdir()
    read = load_config(REPOSITORY / f"configs/{config}.yaml", [*own, *overrides])
    (run_dir / "config.yaml").write_text(dump_config(read))
    return run_dir


def policy_weights(model: Path, seed: int = 1) -> Weights:
    """As DeepSpeed names them, with the wrapper's `model.` in front."""
    return changed(load_causal(str(model), dtype=torch.float32, vocab_chunk_tokens=64), seed)


def critic_weights(model: Path, seed: int = 1) -> Weights:
    return changed(load_scalar(str(model), dtype=torch.float32), seed)


def changed(module: torch.nn.Module, seed: int) -> Weights:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return {name: tensor.detach() for name, tensor in module.state_dict().items() if "token_logprobs" not in name}


def write_checkpoint(
    run_dir: Path, step: int, commit: bool = True, metrics: dict[str, float] | None = None, **roles: Weights
) -> Path:
    """A checkpoint as ZeRO stages 0 to 2 write it: the whole model in one file."""
    store = CheckpointStore(run_dir, keep_last=9, keep_best=None)
    folder = store.begin(step)
    for role, weights in roles.items():
        state = folder / role / "state"
        state.mkdir(parents=True)
        torch.save({"module": weights}, state / "mp_rank_00_model_states.pt")
    if commit:
        store.commit(step, {}, metrics or {})
    return folder


def write_stage_3(folder: Path, weights: Weights, shared: dict[str, str], ranks: int) -> None:
    """Shards as ZeRO stage 3 writes them: of each flattened weight, padded at its end, every rank has an equal part."""
    state = folder / "state"
    state.mkdir(parents=True)
    own = {name: tensor for name, tensor in weights.items() if name not in shared}
    for rank in range(ranks):
        parts = []
        for tensor in own.values():
            flat = tensor.flatten()
            each = -(-len(flat) // ranks)
            parts.append(torch.nn.functional.pad(flat, (0, each * ranks - len(flat)))[rank * each : (rank + 1) * each])
        model = {
            "module": {},
            "buffer_names": [],
            "param_shapes": [{name: tensor.shape for name, tensor in own.items()}],
            "shared_params": shared,
            "ds_version": "0.19.8",
        }
        torch.save(model, state / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        optimizer = {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": [torch.cat(parts)]}
        torch.save({"optimizer_state_dict": optimizer}, state / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def check_equal(model: torch.nn.Module, weights: Weights) -> None:
    """The model has these weights, in its own dtype."""
    found = model.state_dict()
    assert {f"model.{name}" for name in found} == set(weights)
    for name, tensor in found.items():
        assert torch.equal(tensor, weights[f"model.{name}"].to(tensor.dtype)), name


def test_the_newest_complete_checkpoint_of_a_run_becomes_a_model(
    cli: RunCli, ppo_run: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    weights = policy_weights(tiny_model_dir, seed=2)
    write_checkpoint(ppo_run, 2, policy=policy_weights(tiny_model_dir, seed=1))
    newest = write_checkpoint(ppo_run, 4, policy=weights)
    write_checkpoint(ppo_run, 6, commit=False, policy=policy_weights(tiny_model_dir, seed=3))
    out = tmp_path / "new" / "model"

    done = cli("export", ppo_run, out)
    assert done.exit_code == 0, done.output
    assert str(newest) in done.stdout
    assert f"AutoModelForCausalLM.from_pretrained('{out}')" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    check_equal(model, weights)
    assert (out / "model.safetensors").is_file()
    assert list(out.parent.iterdir()) == [out]


def test_the_tokenizer_comes_along(cli: RunCli, ppo_run: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    write_checkpoint(ppo_run, 2, policy=policy_weights(tiny_model_dir))
    out = tmp_path / "out"
    assert cli("export", ppo_run, out).exit_code == 0
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(tiny_model_dir)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template


def test_generation_settings_come_along(cli: RunCli, tiny_model_dir: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model_dir, tmp_path / "source")
    settings = GenerationConfig.from_pretrained(source)
    settings.max_new_tokens = 77
    settings.save_pretrained(source)
    run_dir = make_run(tmp_path / "run", "tiny", source)
    write_checkpoint(run_dir, 2, policy=policy_weights(source))
    assert cli("export", run_dir, tmp_path / "out").exit_code == 0
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 77


def test_generation_settings_that_transformers_refuses_to_save_come_along(
    cli: RunCli, tiny_model_dir: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_model_dir, tmp_path / "source")
    (source / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    run_dir = make_run(tmp_path / "run", "tiny", source)
    write_checkpoint(run_dir, 2, policy=policy_weights(source))
    assert cli("export", run_dir, tmp_path / "out").exit_code == 0
    settings = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (settings["temperature"], settings["top_p"]) == (0.9, 0.6)


def test_a_named_checkpoint_is_taken(cli: RunCli, ppo_run: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    weights = policy_weights(tiny_model_dir, seed=1)
    early = write_checkpoint(ppo_run, 2, policy=weights)
    write_checkpoint(ppo_run, 4, policy=policy_weights(tiny_model_dir, seed=2))
    (tmp_path / "out").mkdir()  # an empty folder is fine
    assert cli("export", early, tmp_path / "out").exit_code == 0
    check_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), weights)


def test_the_critic_becomes_a_classifier(cli: RunCli, ppo_run: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    weights = critic_weights(tiny_model_dir)
    write_checkpoint(ppo_run, 2, policy=policy_weights(tiny_model_dir), critic=weights)
    done = cli("export", ppo_run, tmp_path / "out", "--role", "critic")
    assert done.exit_code == 0, done.output
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 1
    check_equal(model, weights)


def test_a_reward_model_has_the_number_format_of_its_run(cli: RunCli, tiny_model_dir: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", "tiny_reward", tiny_model_dir, "reward.engine.dtype=bfloat16")
    weights = critic_weights(tiny_model_dir)
    write_checkpoint(run_dir, 3, reward=weights)
    done = cli("export", run_dir, tmp_path / "out")
    assert done.exit_code == 0, done.output
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    check_equal(model, weights)


@pytest.mark.parametrize(
    ("metrics", "scale"), [({"score/mean": 0.5, "score/std": 2.0}, ScoreScale(0.5, 2.0)), ({"train/loss": 1.0}, None)]
)
def test_a_reward_model_has_the_scale_of_its_own_step_and_no_other(
    cli: RunCli,
    tiny_model_dir: Path,
    as_reward_model: Callable[[Path], Path],
    tmp_path: Path,
    metrics: dict[str, float],
    scale: ScoreScale | None,
) -> None:
    source = shutil.copytree(as_reward_model(tiny_model_dir), tmp_path / "source")
    write_scale(source, ScoreScale(9.0, 9.0))
    run_dir = make_run(tmp_path / "run", "tiny_reward", source)
    write_checkpoint(run_dir, 3, metrics=metrics, reward=critic_weights(tiny_model_dir))
    assert cli("export", run_dir, tmp_path / "out").exit_code == 0
    assert scale_of(str(tmp_path / "out")) == scale


@pytest.mark.parametrize("ranks", [1, 3])
def test_shards_of_stage_3_are_put_together(
    cli: RunCli, ppo_run: Path, tiny_model_dir: Path, tmp_path: Path, ranks: int
) -> None:
    weights = policy_weights(tiny_model_dir)
    store = CheckpointStore(ppo_run, keep_last=1, keep_best=None)
    tied = {"model.lm_head.weight": "model.model.embed_tokens.weight"}
    write_stage_3(store.begin(2) / "policy", weights, tied, ranks)
    store.commit(2, {}, {})
    done = cli("export", ppo_run, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "Processing zero checkpoint" not in done.output  # DeepSpeed prints
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    check_equal(model, weights)


@pytest.mark.parametrize("named_twice", [True, False])
def test_a_tied_weight_is_written_once(cli: RunCli, tiny_model_dir: Path, tmp_path: Path, named_twice: bool) -> None:
    run_dir = make_run(tmp_path / "run", "tiny", tiny_model_dir, "policy.engine.dtype=bfloat16")
    weights = policy_weights(tiny_model_dir)
    saved = {name: tensor for name, tensor in weights.items() if named_twice or "lm_head" not in name}
    write_checkpoint(run_dir, 2, policy=saved)
    done = cli("export", run_dir, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert set(load_file(tmp_path / "out/model.safetensors")) == {
        name.removeprefix("model.") for name in weights if "lm_head" not in name
    }
    check_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), weights)


def test_what_lies_beside_the_output_folder_stays(
    cli: RunCli, ppo_run: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    write_checkpoint(ppo_run, 1, policy=policy_weights(tiny_model_dir))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine.txt").write_text("mine")
    assert cli("export", ppo_run, tmp_path / "out").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {ppo_run.name, "out", "out.partial"}
    assert (tmp_path / "out.partial/mine.txt").exists()


def test_what_is_in_the_output_folder_stays(cli: RunCli, ppo_run: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    write_checkpoint(ppo_run, 2, policy=policy_weights(tiny_model_dir))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    done = cli("export", ppo_run, out)
    assert done.exit_code == 2
    assert done.stderr == f"error: {out} is not empty: choose another output folder, or remove it\n"
    assert [path.name for path in out.iterdir()] == ["mine.txt"]

    done = cli("export", ppo_run, out / "mine.txt")
    assert done.exit_code == 2
    assert "is a file" in done.stderr


def test_sources_that_are_none(cli: RunCli, ppo_run: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    for source, reason in (
        (tmp_path / "none", "is no folder"),
        (tiny_model_dir, "is neither the folder of a run with checkpoints nor one checkpoint"),
    ):
        done = cli("export", source, tmp_path / "out")
        assert done.exit_code == 2
        assert f"error: {source} {reason}" in done.stderr

    write_checkpoint(ppo_run, 2, commit=False)
    done = cli("export", ppo_run, tmp_path / "out")
    assert done.exit_code == 2
    assert done.stderr.endswith(f"error: {ppo_run}/checkpoints has no complete checkpoint yet\n")


def test_a_role_that_was_not_trained(cli: RunCli, ppo_run: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    write_checkpoint(ppo_run, 2, policy=policy_weights(tiny_model_dir))
    done = cli("export", ppo_run, tmp_path / "out", "--role", "reward")
    assert done.exit_code == 2
    assert "trained no reward, only policy and critic" in done.stderr
    assert cli("export", ppo_run, tmp_path / "out", "--role", "judge").exit_code == 2


def test_a_damaged_checkpoint_is_refused(cli: RunCli, ppo_run: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(ppo_run, 2, policy=policy_weights(tiny_model_dir))
    file = folder / "policy/state/mp_rank_00_model_states.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = cli("export", folder, tmp_path / "out")
    assert done.exit_code == 1
    assert "checksum differs: policy/state/mp_rank_00_model_states.pt" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda weights: weights.pop("model.model.norm.weight"), "it lacks model.norm.weight"),
        (lambda weights: weights.update({"model.extra": torch.ones(1)}), "it has extra, which the model has not"),
        (lambda weights: weights.update({"model.model.norm.weight": torch.ones(3)}), "size mismatch"),
    ],
)
def test_weights_of_another_model_leave_nothing_behind(
    cli: RunCli,
    ppo_run: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    damage: Callable[[Weights], object],
    reason: str,
) -> None:
    weights = policy_weights(tiny_model_dir)
    damage(weights)
    write_checkpoint(ppo_run, 2, policy=weights)
    done = cli("export", ppo_run, tmp_path / "out")
    assert done.exit_code == 1
    assert f"does not fit the policy from '{tiny_model_dir}'" in done.stderr
    assert reason in done.stderr
    assert list(tmp_path.iterdir()) == [ppo_run]


def test_an_export_that_fails_half_way_leaves_nothing_behind(
    cli: RunCli, ppo_run: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(ppo_run, 2, policy=policy_weights(tiny_model_dir))

    def no_tokenizer(*arguments: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("rlhf_ray.models.heads.load_tokenizer", no_tokenizer)
    done = cli("export", ppo_run, tmp_path / "out")
    assert isinstance(done.exception, OSError)
    assert list(tmp_path.iterdir()) == [ppo_run]


def test_a_model_folder_that_has_gone(cli: RunCli, tiny_model_dir: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", "tiny", tiny_model_dir, f"policy.model={tmp_path}/gone")
    write_checkpoint(run_dir, 2, policy=policy_weights(tiny_model_dir))
    done = cli("export", run_dir, tmp_path / "out")
    assert done.exit_code == 1
    assert f"model '{tmp_path}/gone': no such folder" in done.stderr
    assert "a relative path counts from the current folder" in done.stderr


def test_adapters_are_merged_and_written_by_themselves(cli: RunCli, tiny_model_dir: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", "tiny", tiny_model_dir, "policy.lora={rank: 2, alpha: 4}", "reference={}")
    lora = Lora(rank=2, alpha=4.0)
    model = load_causal(str(tiny_model_dir), dtype=torch.float32, vocab_chunk_tokens=64, lora=lora)
    weights = changed(model, seed=1)
    write_checkpoint(run_dir, 2, policy=weights)
    base = load_file(tiny_model_dir / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (weights[f"model.{name}.lora_{part}.default.weight"] for part in "AB")

    done = cli("export", run_dir, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert f"{tmp_path}/out/adapter, in peft's format" in done.stdout
    merged, adapter = (
        load_file(tmp_path / "out" / file) for file in ("model.safetensors", "adapter/adapter_model.safetensors")
    )
    assert merged.keys() == base.keys()
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 2.0 * b @ a)
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])
    assert torch.equal(adapter[f"base_model.model.{name}.lora_A.weight"], a)
    assert len(adapter) == len(weights)


def test_a_checkpoint_of_whole_weights_does_not_fit_a_lora(cli: RunCli, tiny_model_dir: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", "tiny", tiny_model_dir, "policy.lora={rank: 2}", "reference={}")
    write_checkpoint(run_dir, 2, policy=policy_weights(tiny_model_dir))
    done = cli("export", run_dir, tmp_path / "out")
    assert done.exit_code == 1
    assert f"does not fit the policy from '{tiny_model_dir}' with its lora: " in done.stderr
    assert "Missing key(s)" in done.stderr
    assert list(tmp_path.iterdir()) == [run_dir]
