"""configs/tiny.yaml end to end: what `train` leaves behind."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.loading import load_config
from rlhf_ray.controllers.train import train
from rlhf_ray.recovery.checkpoints import CheckpointStore
from rlhf_ray.telemetry.metrics import Metrics, read_metrics
from rlhf_ray.telemetry.names import METRICS, find_metric
from rlhf_ray.telemetry.samples import read_samples
from runs import MakeConfig, assert_same_run, exported_weights, span_names, without_clock

STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, ppo_config: MakeConfig) -> PPOJob:
    return ppo_config(tmp_path_factory.mktemp("ppo") / "run")


@pytest.fixture(scope="module")
def run(config: PPOJob) -> Path:
    """Run folder of configs/tiny.yaml."""
    return train(config)


@pytest.fixture(scope="module")
def rows(run: Path) -> list[Metrics]:
    return read_metrics(run)


def test_every_step_has_a_row_with_every_metric(rows: list[Metrics]) -> None:
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    unknown = {name for row in rows for name in row if find_metric(name) is None}
    assert not unknown
    of_others = ("train/", "eval/", "data/", "score/", "epoch", "reward/<", "group/")
    wanted = {name for name in METRICS if not name.startswith(of_others)}
    for row in rows:
        missing = wanted - row.keys() - ({"time/checkpoint_s"} if row["step"] % 2 else set())
        assert not missing, f"step {row['step']}"
        assert row["reward/sentiment"] == pytest.approx(row["reward/mean"])


def test_the_first_step_compares_the_policy_with_itself(rows: list[Metrics]) -> None:
    first = rows[0]
    assert abs(first["policy/approx_kl"]) < 1e-6
    assert first["policy/clip_fraction"] == 0
    assert abs(first["kl/mean"]) < 1e-5
    assert first["policy/optimizer_steps"] == 1


def test_the_policy_moves_away_from_the_reference(rows: list[Metrics]) -> None:
    assert all(row["kl/mean"] > 0.01 for row in rows[1:])


def test_engine_and_trainer_agree_after_every_weight_sync(rows: list[Metrics]) -> None:
    for row in rows:
        assert row["mismatch/logprob_abs_mean"] <= 1e-4, f"step {row['step']}"
        assert row["staleness/mean"] == 0


def test_ranks_that_share_sequences_and_an_engine_over_two_workers_give_the_same_run(
    rows: list[Metrics], ppo_config: MakeConfig, tmp_path: Path
) -> None:
    both = [f"{role}.engine.sequence_parallel=2" for role in ("policy", "critic", "reference", "reward.0")]
    folder = train(
        ppo_config(
            tmp_path / "run",
            *both,
            "policy.engine.zero_stage=3",
            "policy.engine.micro_batch_tokens=100",
            "reference.engine.zero_stage=3",
            "placement.policy.ranks=2",
            "placement.critic.ranks=2",
            "placement.rollout.tensor_parallel=2",
            "run.steps=2",
        )
    )
    for mine, theirs in zip(read_metrics(folder), rows, strict=False):
        assert without_clock(mine) == pytest.approx(without_clock(theirs), rel=2e-3, abs=2e-4), mine["step"]
        assert mine["mismatch/logprob_abs_mean"] <= 1e-4


def test_the_export_loads_with_transformers_and_equals_the_checkpoint(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    checkpoint = torch.load(
        run / f"checkpoints/step_{STEPS:06d}/policy/state/mp_rank_00_model_states.pt", weights_only=False
    )["module"]
    exported = dict(model.named_parameters())
    trained = {name.removeprefix("model."): tensor for name, tensor in checkpoint.items()}
    assert exported.keys() <= trained.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, trained[name]), name
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    prompt = tokenizer("I think that the story", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_the_export_is_a_model_that_has_learned(run: Path, config: PPOJob) -> None:
    before, after = exported_weights(Path(config.policy.model)), exported_weights(run / "export")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_samples_are_written_with_their_scores(run: Path, rows: list[Metrics], config: PPOJob) -> None:
    samples = read_samples(run)
    assert {step for step, _ in samples} == set(range(1, STEPS + 1))
    assert len(samples) == STEPS * config.run.samples_kept
    for _, sample in samples:
        assert sample.prompt
        assert sample.score == pytest.approx(sample.rewards["sentiment"])


def test_the_showcase_has_the_same_prompts_before_and_after(run: Path, config: PPOJob) -> None:
    head, rule, *lines = (run / "before_after.md").read_text().splitlines()
    assert head == "| prompt | before | score | after | score |"
    assert rule.count("---") == 5
    assert len(lines) == config.run.samples_kept
    assert all(line.startswith("| ") for line in lines)


def test_the_timeline_shows_all_roles(run: Path) -> None:
    events = json.loads((run / "timeline.json").read_text())["traceEvents"]
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert set(processes.values()) >= {"policy", "critic", "reference", "reward-sentiment", "rollout"}
    work = {(processes[event["pid"]], event["name"]) for event in events if event["ph"] == "X"}
    assert work >= {
        ("rollout", "generate"),
        ("rollout", "receive weights"),
        ("reference", "log-probs"),
        ("reward-sentiment", "score"),
        ("critic", "values"),
        ("critic", "advantages"),
        ("critic", "update"),
        ("policy", "log-probs"),
        ("policy", "update"),
        ("policy", "send weights"),
        ("policy", "checkpoint"),
    }


def test_the_run_folder_is_complete(run: Path, config: PPOJob) -> None:
    assert load_config(run / "config.yaml") == config
    [session] = json.loads((run / "manifest.json").read_text())["sessions"]
    assert (session["name"], session["seed"]) == (config.name, config.seed)
    assert session["cluster"]["nodes"][0]["alive"]
    with Image.open(run / "curves.png") as image:
        assert min(image.size) > 100
    assert any((run / "tensorboard").iterdir())
    assert not list(run.glob("failed_step_*"))


def test_the_newest_checkpoints_are_kept(run: Path) -> None:
    store = CheckpointStore(run, keep_last=2, keep_best=None)
    assert store.steps() == [2, 4]
    latest = store.latest()
    assert latest is not None
    assert latest.step == STEPS
    assert latest.state["version"] == STEPS


def test_all_roles_on_one_place_that_leave_it_to_each_other_train_as_apart(
    tmp_path: Path, run: Path, ppo_config: MakeConfig
) -> None:
    guests = [f"placement.{role}.colocate=policy" for role in ("critic", "reference", "reward", "rollout")]
    guests += ["placement.critic.cpus=1"]  # what a role reserves that has no place of its own: the default
    # After each checkpoint, and after both showcases, whose scores a reward model on the same place gives, the engine
    # has lost its weights.
    together = train(ppo_config(tmp_path / "run", *guests, "placement.offload_idle=true", "run.checkpoint_every=1"))
    assert_same_run(together, run)
    assert read_samples(together) == read_samples(run)
    assert (together / "before_after.md").read_text() == (run / "before_after.md").read_text()
    assert {"going to out", "going to weights", "going to full"} <= span_names(together)
