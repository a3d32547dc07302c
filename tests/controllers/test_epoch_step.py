"""Steps of a job that goes over a data set, against sums over its tokens, on a worker whose engine is scripted."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.actors.sft import SFTGroup, SFTWorker
from rlhf_ray.config.jobs import SFTJob
from rlhf_ray.controllers.diverged import TrainingDiverged
from rlhf_ray.controllers.epochs import ENDED, EpochController
from rlhf_ray.controllers.inputs import EpochInputs
from rlhf_ray.controllers.run_folder import Checkpointing
from rlhf_ray.data.conversations import ConversationSet
from rlhf_ray.data.trajectory import offsets_of
from scripted import ScriptedActors, ScriptedFolder, World, entropy_of, output, script

ROWS = 10


def conversations(name: str, rows: int, first: int) -> ConversationSet:
    lengths = [3 + row * 5 % 7 for row in range(rows)]
    learnt = np.concatenate([np.arange(length) >= 1 + row % 2 for row, length in enumerate(lengths)])
    return ConversationSet(
        uids=tuple(f"{name}{row}" for row in range(rows)),
        token_ids=np.arange(first, first + sum(lengths), dtype=np.int32),
        learnt=learnt,
        offsets=offsets_of(lengths),
        dropped=0,
        truncated=0,
    )


TRAIN, HELD_OUT = conversations("t", ROWS, 1000), conversations("e", 4, 5000)


def learnt_tokens(data: ConversationSet) -> list[int]:
    return data.token_ids[data.learnt].tolist()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return script(monkeypatch)


def job_in(folder: Path, **run: Any) -> SFTJob:
    return SFTJob.model_validate(
        {
            "job": "sft",
            "name": "scripted",
            "seed": 3,
            "policy": {"model": "m", "engine": {"zero_stage": 2, "dtype": "float32", "micro_batch_tokens": 12}},
            "data": {"train": "t.jsonl", "eval": "e.jsonl", "rows_per_step": 4},
            "placement": {"policy": {"ranks": 2}},
            "run": {"dir": str(folder), "epochs": 2, "export": False} | run,
        }
    )


def start(job: SFTJob, world: World, steps: int = 6) -> EpochController:
    folder = ScriptedFolder(job, world)
    group = ScriptedActors(world).ranks(job.trained, SFTWorker, SFTGroup, job)
    group.load_model(job.policy, steps).wait(job.run.timeouts.setup)
    checkpointing = Checkpointing(folder, {job.trained.name: group}, job.run.timeouts)
    return EpochController(job, EpochInputs(steps, TRAIN, HELD_OUT), group, folder, checkpointing)


def test_each_step_is_the_mean_over_its_learnt_tokens_and_each_row_comes_once_an_epoch(
    world: World, tmp_path: Path
) -> None:
    start(job_in(tmp_path), world).train()
    assert sorted(world.logged) == [1, 2, 3, 4, 5, 6]
    by_step = []
    for step in range(6):
        passes = [each for each in world.passes("policy") if each.step == step]
        gradients = {token: value for each in passes for token, value in each.gradient.items()}
        by_step.append(sorted(gradients))
        assert list(gradients.values()) == pytest.approx([-1 / len(gradients)] * len(gradients))
        logged = world.logged[step + 1]
        assert logged["train/loss"] == pytest.approx(
            -np.mean([output("policy", token, step) for token in gradients]), rel=1e-5
        )
        assert logged["train/entropy"] == pytest.approx(np.mean([entropy_of(token) for token in gradients]))
        assert logged["train/lr"] == pytest.approx(0.1 * (step + 1))
        assert logged["train/grad_norm"] == world.grad_norm
        assert logged["epoch"] == pytest.approx((step + 1) / 3)
    for epoch in (by_step[:3], by_step[3:]):
        assert sorted(token for tokens in epoch for token in tokens) == learnt_tokens(TRAIN)
    assert by_step[:3] != by_step[3:]


def test_the_evaluation_is_of_the_held_out_rows_with_the_weights_after_the_step(world: World, tmp_path: Path) -> None:
    start(job_in(tmp_path, eval_every=4), world).train()
    assert [step for step, logged in world.logged.items() if "eval/loss" in logged] == [4, 6]
    for step in (4, 6):
        loss = -np.mean([output("policy", token, step) for token in learnt_tokens(HELD_OUT)])
        assert world.logged[step]["eval/loss"] == pytest.approx(loss, rel=1e-5)
        assert world.logged[step]["eval/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


LOSSES = {0: 0.0, 1: 0.2, 2: 0.5, 3: 0.4, 4: 0.3, 5: 0.9, 6: 1.0}


def early(folder: Path) -> SFTJob:
    best = {"metric": "eval/loss", "mode": "min"}
    return job_in(folder, eval_every=1, keep_best=best, patience=2, keep_last=1)


def test_a_run_that_stops_getting_better_ends_with_its_best_weights(world: World, tmp_path: Path) -> None:
    """The second step is the best, and two without a new best end it."""
    world.level = LOSSES
    controller = start(early(tmp_path), world)
    controller.train()
    assert sorted(world.logged) == [1, 2, 3, 4]
    assert [engine.steps for engine in world.engines["policy"]] == [2, 2]
    assert (controller.step, controller.metrics) == (2, world.logged[2])
    assert controller.folder.checkpoints.steps() == [2, 4]
    last, best = controller.folder.checkpoints.latest(), controller.folder.checkpoints.best()
    assert last is not None
    assert best is not None
    assert (last.state[ENDED], best.state[ENDED]) == (True, False)
    assert last.state["early_stop"]["since_best"] == 2


def test_a_run_that_is_resumed_goes_on_with_its_rows_and_its_patience(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.level = LOSSES
    start(early(tmp_path / "whole"), world).train()
    whole = {step: [p.gradient for p in world.passes("policy") if p.step == step - 1] for step in (3, 4)}

    first = script(monkeypatch)
    first.level = LOSSES
    controller = start(early(tmp_path / "cut"), first)
    for step in (1, 2, 3):  # the third has no checkpoint
        controller.train_step(step)
    second = script(monkeypatch)
    second.level = LOSSES
    resumed = start(early(tmp_path / "cut"), second)
    resumed.train()
    assert sorted(second.logged) == [3, 4]
    for step, gradients in whole.items():
        assert [p.gradient for p in second.passes("policy") if p.step == step - 1] == gradients
    assert second.logged[4]["eval/loss"] == world.logged[4]["eval/loss"]
    assert resumed.step == 2


def test_checkpoints_hold_the_weights_and_metrics_of_their_step(world: World, tmp_path: Path) -> None:
    controller = start(job_in(tmp_path, checkpoint_every=2, keep_last=5), world)
    controller.train()
    assert controller.folder.checkpoints.steps() == [2, 4, 6]
    for step in (2, 4, 6):
        found = controller.folder.checkpoints._load(step)
        assert found is not None
        assert (found.folder / "policy" / "steps.json").read_text() == str(step)
        assert found.metrics == world.logged[step]
        assert found.state[ENDED] == (step == 6)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_loss_that_is_no_number_ends_the_run_before_the_optimizer_step(
    world: World, tmp_path: Path, what: str
) -> None:
    if what == "loss":
        world.spoil = True
    else:
        world.grad_norm = math.nan
    with pytest.raises(TrainingDiverged, match=f"step 1: .*: {what} is nan") as raised:
        start(job_in(tmp_path), world).train()
    assert raised.value.samples_file.read_text().count('"uid":"t'.replace(":", ": ")) >= 1
    assert {engine.steps for engine in world.engines["policy"]} == ({0} if what == "loss" else {1})
    assert world.logged == {}
