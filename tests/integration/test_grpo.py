"""A run that compares the samples of a prompt with each other has no critic anywhere, and goes on to the last bit."""

import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.loading import load_config
from rlhf_ray.controllers.number_formats import choose_before_start
from rlhf_ray.controllers.train import train
from rlhf_ray.telemetry.manifest import last_session
from rlhf_ray.telemetry.metrics import read_metrics
from rlhf_ray.telemetry.status_actor import read_status_actor
from runs import MakeConfig, assert_same_run, status_command

CONFIG = Path(__file__).parents[2] / "configs/tiny_grpo.yaml"
STEPS, STOPPED = 2, 1
ACTORS = {"policy/0", "reference/0", "reward-sentiment/0", "rollout/0"}


@pytest.fixture(scope="module")
def grpo_config(tiny: Path, reward_run: Path) -> MakeConfig:
    """configs/tiny_grpo.yaml on the tiny model and the trained reward model, with a checkpoint of each step."""

    def make(run_dir: Path, *overrides: str) -> PPOJob:
        loaded = load_config(
            CONFIG,
            [
                f"policy.model={tiny}/models/tiny",
                f"reward.0.model={reward_run}/export",
                f"data.prompts={tiny}/data/tiny_prompts.jsonl",
                "run.deterministic=true",
                f"run.steps={STEPS}",
                f"run.checkpoint_every={STOPPED}",
                "run.tensorboard=false",
                f"run.dir={run_dir}",
                *overrides,
            ],
        )
        config = choose_before_start(loaded).config
        assert isinstance(config, PPOJob)
        return config

    return make


@pytest.fixture(scope="module")
def watched_run(grpo_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str], str]:
    """A run's folder, all actors that its status ever had, and what `rlhf-ray status` printed of it meanwhile."""
    folder, actors, printed = tmp_path_factory.mktemp("grpo") / "run", set[str](), ""
    with ThreadPoolExecutor(1) as thread:
        end = thread.submit(train, grpo_config(folder))
        while not end.done():
            if (folder / "manifest.json").exists():
                status = read_status_actor(last_session(folder).status_actor, 30)
                actors |= {actor.name for actor in status.actors} if status is not None else set()
            if not printed and len(actors) >= len(ACTORS):
                printed = status_command(folder)
            time.sleep(0.1)
    return end.result(), actors, printed


def test_four_roles_run_and_no_critic(watched_run: tuple[Path, set[str], str]) -> None:
    folder, actors, printed = watched_run
    assert actors == ACTORS
    assert set(re.findall(r"^([\w-]+/\d+) ", printed, re.MULTILINE)) == ACTORS, printed
    checkpoints = sorted((folder / "checkpoints").iterdir())
    assert checkpoints
    for checkpoint in checkpoints:
        assert {path.name for path in checkpoint.iterdir() if path.is_dir()} == {"policy"}


def test_the_metrics_tell_of_groups_and_not_of_a_critic(watched_run: tuple[Path, set[str], str]) -> None:
    rows = read_metrics(watched_run[0])
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert 0 < row["group/spread_fraction"] <= 1
        assert not [name for name in row if "critic" in name]
    assert abs(rows[0]["kl/mean"]) < 1e-5
    assert rows[1]["kl/mean"] > 1e-3, "it has learned something"


def test_a_resumed_run_is_the_same_to_the_last_bit(
    watched_run: tuple[Path, set[str], str], grpo_config: MakeConfig, tmp_path: Path
) -> None:
    undisturbed, stopped = watched_run[0], tmp_path / "run"
    shutil.copytree(undisturbed, stopped)
    shutil.rmtree(stopped / "export")
    shutil.rmtree(stopped / f"checkpoints/step_{STEPS:06d}")
    train(grpo_config(stopped))
    assert_same_run(stopped, undisturbed)
