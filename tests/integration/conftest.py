"""One Ray cluster for all integration tests, and what their runs start from."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from rlhf_ray.config.jobs import PPOJob, RewardModelJob, SFTJob
from rlhf_ray.config.loading import load_config
from rlhf_ray.controllers.number_formats import choose_before_start
from rlhf_ray.controllers.train import train
from rlhf_ray.data.prepare import prepare
from rlhf_ray.models.tiny import build_tiny_model
from runs import MARK, MakeConfig

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"

# Computing with one thread gives the same numbers in any process, and these models gain nothing from more.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder start Ray."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster of its own, which the controllers' `ray_session` finds and uses."""
    # Actors import what the tests define, reward functions and workers, and what benchmarks do.
    folders = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    os.environ.update(MARK)
    ray.init(
        address="local",  # else it joins whatever cluster runs on this machine
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
        _system_config={"worker_niceness": 0},  # as in `ray_session`
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the tiny model, prompts and pairs, as `rlhf-ray prepare --only tiny` makes them."""
    target = tmp_path_factory.mktemp("tiny")
    prepare(target, only={"tiny"})
    return target


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for ZeRO-3 to shard its matrices, and for several buckets of a mebibyte in weight sync."""
    return build_tiny_model(tmp_path_factory.mktemp("wide") / "model", hidden=256)


@pytest.fixture(scope="session")
def reward_config(tiny: Path) -> Callable[..., RewardModelJob]:
    """configs/tiny_reward.yaml on the tiny model, with further overrides."""

    def make(run_dir: Path, *overrides: str) -> RewardModelJob:
        config = load_config(
            CONFIGS / "tiny_reward.yaml",
            [
                f"reward.model={tiny}/models/tiny",
                f"data.train={tiny}/data/tiny_pairs_train.jsonl",
                f"data.eval={tiny}/data/tiny_pairs_eval.jsonl",
                f"run.dir={run_dir}",
                *overrides,
            ],
        )
        assert isinstance(config, RewardModelJob)
        return config

    return make


@pytest.fixture(scope="session")
def reward_run(tiny: Path, reward_config: Callable[..., RewardModelJob]) -> Path:
    """Run folder of configs/tiny_reward.yaml, with a checkpoint within each epoch."""
    return train(reward_config(tiny / "runs/tiny-reward", "run.checkpoint_every=3", "run.keep_last=9"))


@pytest.fixture(scope="session")
def sft_config(tiny: Path) -> Callable[..., SFTJob]:
    """configs/tiny_sft.yaml on the tiny model, with further overrides."""

    def make(run_dir: Path, *overrides: str) -> SFTJob:
        config = load_config(
            CONFIGS / "tiny_sft.yaml",
            [
                f"policy.model={tiny}/models/tiny",
                f"data.train={tiny}/data/tiny_chats_train.jsonl",
                f"data.eval={tiny}/data/tiny_chats_eval.jsonl",
                f"run.dir={run_dir}",
                *overrides,
            ],
        )
        assert isinstance(config, SFTJob)
        return config

    return make


@pytest.fixture(scope="session")
def ppo_config(tiny: Path, reward_run: Path) -> MakeConfig:
    """configs/tiny.yaml on the tiny model and the trained reward model, with further overrides."""

    def make(run_dir: Path, *overrides: str) -> PPOJob:
        config = load_config(
            CONFIGS / "tiny.yaml",
            [
                f"policy.model={tiny}/models/tiny",
                f"reward.0.model={reward_run}/export",
                f"data.prompts={tiny}/data/tiny_prompts.jsonl",
                f"run.dir={run_dir}",
                *overrides,
            ],
        )
        config = choose_before_start(config).config
        assert isinstance(config, PPOJob)
        return config

    return make
