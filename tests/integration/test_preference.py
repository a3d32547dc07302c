"""configs/tiny_preference.yaml end to end: against its cache, resumed, on two ranks, and with losses of every kind."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.config.jobs import PreferenceJob
from rlhf_ray.config.loading import load_config
from rlhf_ray.controllers.train import train
from rlhf_ray.recovery.convert import export_checkpoint
from rlhf_ray.telemetry.metrics import Metrics, read_metrics
from rlhf_ray.telemetry.names import find_metric
from runs import assert_same_run, exported_weights, span_names, without_clock

CONFIG = Path(__file__).parents[2] / "configs" / "tiny_preference.yaml"
STEPS = 6
TWO_RANKS = (
    "placement.policy.ranks=2",
    "policy.engine.zero_stage=3",
    "policy.engine.micro_batch_tokens=150",
    "reference.engine.zero_stage=3",
    "reference.engine.micro_batch_tokens=150",
)

SHARED_SEQUENCES = (*TWO_RANKS, "policy.engine.sequence_parallel=2", "reference.engine.sequence_parallel=2")

MakeConfig = Callable[..., PreferenceJob]


@pytest.fixture(scope="module")
def config(tiny: Path) -> MakeConfig:
    """configs/tiny_preference.yaml on the tiny model, with further overrides."""

    def make(run_dir: Path, *overrides: str) -> PreferenceJob:
        data = "labels" if any(kind in "".join(overrides) for kind in ("kto", "bco")) else "preferences"
        found = load_config(
            CONFIG,
            [
                f"policy.model={tiny}/models/tiny",
                f"data.train={tiny}/data/tiny_{data}_train.jsonl",
                f"data.eval={tiny}/data/tiny_{data}_eval.jsonl",
                f"run.dir={run_dir}",
                *overrides,
            ],
        )
        assert isinstance(found, PreferenceJob)
        return found

    return make


@pytest.fixture(scope="module")
def run(tiny: Path, config: MakeConfig) -> Path:
    """Run folder with a checkpoint within each epoch."""
    return train(config(tiny / "runs/tiny-preference", "run.checkpoint_every=2", "run.keep_last=9"))


def test_the_policy_learns_to_prefer_what_people_chose(run: Path) -> None:
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # Before the first update policy and reference are one model.
    assert rows[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["train/margin"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["train/loss"] < 0.6
    assert [row["step"] for row in rows if "eval/loss" in row] == [4, STEPS]
    assert rows[-1]["train/accuracy"] > 0.9
    assert rows[-1]["eval/margin"] == pytest.approx(rows[-1]["eval/chosen_ratio"] - rows[-1]["eval/rejected_ratio"])
    assert not {name for row in rows for name in row if find_metric(name) is None}
    theirs = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    assert {name: p for name, p in theirs.named_parameters()}.keys()


def test_a_checkpoint_can_be_exported(run: Path, tmp_path: Path) -> None:
    exported = export_checkpoint(run, tmp_path / "model")
    assert (exported.role, exported.scalar) == ("policy", False)
    mine, theirs = exported_weights(exported.folder), exported_weights(run / "export")
    assert all(mine[name].equal(tensor) for name, tensor in theirs.items())


def resumed(run: Path, folder: Path, config: PreferenceJob) -> Path:
    """A copy of a run that goes on from its first checkpoint."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "export")
    for step in (4, STEPS):
        shutil.rmtree(folder / f"checkpoints/step_{step:06d}")
    return train(config)


def test_a_resumed_run_gives_the_same_rows(run: Path, config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert_same_run(resumed(run, folder, config(folder, "run.checkpoint_every=2", "run.keep_last=9")), run)


def rows_of(folder: Path) -> list[Metrics]:
    """Metrics of a run that can be compared with another's which cuts its micro-batches elsewhere.

    In the first step the policy is the reference, so rounding alone says which answer has the higher log-ratio.
    """
    first, *others = map(without_clock, read_metrics(folder))
    return [{name: value for name, value in first.items() if name != "train/accuracy"}, *others]


def actors_of(folder: Path) -> set[str]:
    """Roles that left a trace."""
    events = json.loads((folder / "timeline.json").read_text())
    events = events["traceEvents"] if isinstance(events, dict) else events
    return {event["args"]["name"].split("/")[0] for event in events if event.get("name") == "process_name"}


def test_cached_log_probs_give_the_same_run_and_a_second_run_needs_no_reference(
    run: Path, config: MakeConfig, tmp_path: Path
) -> None:
    cache = f"reference.cache={tmp_path}/cache"
    first = train(config(tmp_path / "first", cache))
    second = train(config(tmp_path / "second", cache, "seed=8"))
    again = train(config(tmp_path / "again", cache))
    assert len(list((tmp_path / "cache").iterdir())) == 2  # train and eval
    wanted = rows_of(run)
    for folder in (first, again):
        for mine, theirs in zip(rows_of(folder), wanted, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert_same_run(again, first)
    assert "reference" in actors_of(run)
    assert "reference" not in actors_of(second) | actors_of(again)


def assert_about_the_same(mine: Path, theirs: Path) -> None:
    for row, wanted in zip(rows_of(mine), rows_of(theirs), strict=True):
        assert row == pytest.approx(wanted, rel=2e-3, abs=2e-4), f"step {row['step']}"


def test_two_sharded_ranks_learn_what_one_learns(run: Path, config: MakeConfig, tmp_path: Path) -> None:
    assert_about_the_same(train(config(tmp_path / "run", *TWO_RANKS)), run)


def test_what_kto_and_bco_take_from_all_rows_of_a_step_is_the_same_on_two_ranks(
    config: MakeConfig, tmp_path: Path
) -> None:
    losses = "algorithm.loss=[{type: kto, beta: 0.2}, {type: bco, beta: 0.2}]"
    settings = (losses, "run.checkpoint_every=2", "run.keep_last=9")
    one = train(config(tmp_path / "one", *settings))
    assert_about_the_same(train(config(tmp_path / "two", *settings, *TWO_RANKS)), one)
    assert_about_the_same(train(config(tmp_path / "shared", *settings, *SHARED_SEQUENCES)), one)
    rows = read_metrics(one)
    assert rows[0]["train/kl"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["train/kl"] != pytest.approx(0, abs=1e-5)
    assert rows[-1]["train/wanted_ratio"] > rows[-1]["train/unwanted_ratio"] + 0.5
    assert rows[0]["train/shift"] == 0
    assert rows[-1]["train/shift"] != 0
    # BCO's running mean of rewards is part of a checkpoint.
    folder = tmp_path / "resumed"
    assert_same_run(resumed(one, folder, config(folder, *settings)), one)


def test_the_order_of_all_rows_of_a_step_is_the_same_on_two_ranks(config: MakeConfig, tmp_path: Path) -> None:
    loss = "algorithm.loss=[{type: aot, beta: 0.2}]"
    one = train(config(tmp_path / "one", loss))
    assert read_metrics(one)[-1]["train/margin"] > 1
    assert_about_the_same(train(config(tmp_path / "two", loss, *TWO_RANKS)), one)
    assert_about_the_same(train(config(tmp_path / "shared", loss, *SHARED_SEQUENCES)), one)


def test_a_reference_that_follows_at_every_step_is_the_policy(config: MakeConfig, tmp_path: Path) -> None:
    folder = train(config(tmp_path / "run", "reference.update_every=1"))
    for row in read_metrics(folder):
        assert row["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert row["train/margin"] == pytest.approx(0, abs=1e-4)


def test_a_reference_that_follows_halfway_is_resumed_as_it_was(config: MakeConfig, tmp_path: Path) -> None:
    follows = ("reference.update_every=2", "reference.update_mix=0.5", "run.checkpoint_every=2", "run.keep_last=9")
    whole = train(config(tmp_path / "whole", *follows))
    rows = read_metrics(whole)
    assert rows[2]["train/margin"] < rows[1]["train/margin"]
    folder = tmp_path / "resumed"
    assert_same_run(resumed(whole, folder, config(folder, *follows)), whole)
    two = train(config(tmp_path / "two", *follows, *TWO_RANKS))
    assert_about_the_same(two, whole)


def test_a_loss_without_reference_starts_none(config: MakeConfig, tmp_path: Path) -> None:
    loss = "algorithm.loss=[{type: simpo}, {type: nll, weight: 0.1}]"
    folder = train(config(tmp_path / "run", loss, "reference={}"))
    assert "reference" not in actors_of(folder)
    rows = read_metrics(folder)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert "train/chosen_ratio" not in rows[0]


def test_with_lora_the_policy_without_its_adapters_is_the_reference(config: MakeConfig, tmp_path: Path) -> None:
    lora = ("policy.lora={rank: 4, alpha: 8}", "reference={}", "run.checkpoint_every=2", "run.keep_last=9")
    whole = train(config(tmp_path / "whole", *lora))
    assert "reference" not in actors_of(whole)
    rows = read_metrics(whole)
    assert rows[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.01
    folder = tmp_path / "resumed"
    assert_same_run(resumed(whole, folder, config(folder, *lora)), whole)
    cached = train(config(tmp_path / "cached", *lora, "reference={cache: " + str(tmp_path / "cache") + "}"))
    for mine, theirs in zip(rows_of(cached), rows_of(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_a_reference_that_leaves_its_device_to_the_policy_changes_nothing(
    run: Path, config: MakeConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    sharing = config(folder, "run.checkpoint_every=2", "run.keep_last=9", "placement.offload_idle=true")
    assert_same_run(resumed(run, folder, sharing), run)
    assert {"going to out", "going to weights", "going to full"} <= span_names(folder)


def test_a_cache_is_filled_by_a_reference_that_leaves_its_device_to_the_policy(
    run: Path, config: MakeConfig, tmp_path: Path
) -> None:
    sharing = (f"reference.cache={tmp_path}/cache", "placement.offload_idle=true")
    folder = train(config(tmp_path / "run", *sharing))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for mine, theirs in zip(rows_of(folder), rows_of(run), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
