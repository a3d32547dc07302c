"""What a config names that must be found elsewhere than in it: models, data, folders."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_ray.config.jobs import JobConfig, PPOJob, PreferenceJob, SFTJob
from rlhf_ray.config.rewards import ModelReward
from rlhf_ray.config.training import ScoringEngine, TrainingEngine


@dataclass(frozen=True)
class Named:
    """A folder, file or hub name in a config.

    Attributes:
        setting: its dotted path.
        value: as it stands there.
        kind: a model or data set to read, a folder that the run writes, or `scratch`, one on each node's own disk.
        role: whose ranks or engines load a model or write to a scratch folder; None for what the controller alone
            touches.
    """

    setting: str
    value: str
    kind: Literal["model", "data", "folder", "scratch"]
    role: str | None = None


def named_in(config: JobConfig) -> Iterator[Named]:
    """Everything of that sort, a model once for each role that loads it."""
    yield from _ppo_models(config) if isinstance(config, PPOJob) else _trained_models(config)
    yield from _data(config)
    yield Named("run.dir", config.run.dir, "folder")
    for setting, engine, role in _engines(config):
        if engine.nvme_path is not None:
            yield Named(f"{setting}.engine.nvme_path", engine.nvme_path, "scratch", role)
    if isinstance(config, PreferenceJob) and config.reference.cache is not None:
        yield Named("reference.cache", config.reference.cache, "folder")


def local_path(named: Named, base: Path = Path()) -> Path | None:
    """The file or folder of this name, seen from `base`; None where there is none, as for the hub's names."""
    path = base / named.value
    if named.kind == "data" and not path.exists():
        # A folder of a data set may carry a split behind a colon.
        path = base / (named.value.rpartition(":")[0] or named.value)
    return path if path.exists() else None


def _ppo_models(config: PPOJob) -> Iterator[Named]:
    yield Named("policy.model", config.policy.model, "model", "policy")
    yield Named("policy.model", config.policy.model, "model", "rollout")
    if config.critic.init_from != "reward":
        yield Named("critic.init_from", config.critic.init_from, "model", "critic")
    elif config.reward_models:
        index = config.reward.index(config.reward_models[0])
        yield Named(f"reward.{index}.model", config.reward_models[0].model, "model", "critic")
    if not config.policy_is_reference:
        yield _reference(config)
    for index, part in enumerate(config.reward):
        if isinstance(part, ModelReward):
            yield Named(f"reward.{index}.model", part.model, "model", "reward")


def _trained_models(config: JobConfig) -> Iterator[Named]:
    assert not isinstance(config, PPOJob)
    role = config.role
    yield Named(f"{role.name}.model", role.trained.model, "model", role.name)
    if isinstance(config, PreferenceJob) and config.algorithm.needs_reference and not config.policy_is_reference:
        yield _reference(config)


def _reference(config: PPOJob | PreferenceJob) -> Named:
    if config.reference.from_model == "policy":
        return Named("policy.model", config.policy.model, "model", "reference")
    return Named("reference.from", config.reference.from_model, "model", "reference")


def _engines(config: JobConfig) -> Iterator[tuple[str, ScoringEngine | TrainingEngine, str]]:
    if isinstance(config, PPOJob):
        yield "policy", config.policy.engine, "policy"
        yield "critic", config.critic.engine, "critic"
        for index, part in enumerate(config.reward):
            if isinstance(part, ModelReward):
                yield f"reward.{index}", part.engine, "reward"
    else:
        yield config.role.name, config.role.trained.engine, config.role.name
    if isinstance(config, PPOJob | PreferenceJob) and "reference" in config.places:
        yield "reference", config.reference.engine, "reference"


def _data(config: JobConfig) -> Iterator[Named]:
    if isinstance(config, PPOJob):
        yield Named("data.prompts", config.data.prompts, "data")
        return
    if isinstance(config, SFTJob) and not isinstance(config.data.train, str):
        for index, source in enumerate(config.data.train):
            yield Named(f"data.train.{index}.path", source.path, "data")
    else:
        assert isinstance(config.data.train, str)
        yield Named("data.train", config.data.train, "data")
    if config.data.eval is not None:
        yield Named("data.eval", config.data.eval, "data")
