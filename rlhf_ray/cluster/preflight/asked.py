"""What a config asks of the nodes, beside places for its actors."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rlhf_ray.config.jobs import JobConfig, PPOJob, PreferenceJob, RewardModel
from rlhf_ray.config.rewards import FunctionReward, HttpReward
from rlhf_ray.config.run import EpochRun, PPORun
from rlhf_ray.config.training import Critic, Dtype, Policy
from rlhf_ray.models.config_json import read_shape
from rlhf_ray.models.lora_sizes import adapter_sizes
from rlhf_ray.models.shapes import Head, ModelShape

_BYTES: Mapping[Dtype, int] = {"bfloat16": 2, "float32": 4}
_ADAM_BYTES = 12
"""Of a trained parameter in a checkpoint, beside its weight: float32 master weight and the optimizer's two moments."""


@dataclass(frozen=True)
class DiskNeed:
    """What a run writes that stays.

    Attributes:
        size: most bytes at a time, a checkpoint that is being written included.
        what: in words.
    """

    size: int
    what: str


@dataclass(frozen=True)
class Transfer:
    """What goes over the network at once.

    Attributes:
        what: in words.
        size: bytes.
        limit_s: seconds that it may take.
        setting: that limits it.
    """

    what: str
    size: int
    limit_s: float
    setting: str


def modules_and_variables(config: JobConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Modules of reward functions, and environment variables with the tokens of services, by their settings."""
    modules, variables = {}, {}
    for index, part in enumerate(config.reward if isinstance(config, PPOJob) else ()):
        if isinstance(part, FunctionReward):
            modules[f"reward.{index}.function"] = part.function.partition(":")[0]
        elif isinstance(part, HttpReward) and part.token_env is not None:
            variables[f"reward.{index}.token_env"] = part.token_env
    return modules, variables


def disk_need(config: JobConfig) -> DiskNeed:
    """Room for checkpoints and exports.

    Raises:
        ShapeError: the size of a model can't be told from its config.json.
    """
    one = sum(_checkpoint_bytes(section, shape) for section, shape in _trained(config))
    if isinstance(config, PreferenceJob) and config.reference.update_every:
        one += read_shape(config.reference_model).parameters * _BYTES[config.reference.engine.dtype]
    count = _checkpoints(config)
    what = f"{count} checkpoint{'s'[: count > 1]} of {describe_bytes(one)}"
    size = count * one
    if config.run.export:
        section, shape = next(_trained(config))
        exported = shape.parameters * _BYTES[section.engine.dtype]
        # A new one is written beside the one that is there.
        copies = 2 if count > 1 else 1
        size += copies * exported
        what += f" and {copies} export{'s'[: copies > 1]} of {describe_bytes(exported)}"
    return DiskNeed(size, what)


def transfers(config: JobConfig) -> Iterator[Transfer]:
    """What travels between nodes in each step, with its time limit.

    Raises:
        ShapeError: as `disk_need`.
    """
    timeouts = config.run.timeouts
    if isinstance(config, PPOJob):
        weights = read_shape(config.policy.model).parameters * _BYTES[config.policy.engine.dtype]
        yield Transfer("one weight sync", weights, timeouts.sync_s, "run.timeouts.sync_s")
    for (section, shape), name in zip(_trained(config), _names(config), strict=True):
        # An all-reduce sends every gradient once there and once back.
        size = 2 * _trained_parameters(section, shape) * _BYTES[section.engine.dtype]
        yield Transfer(f"one reduction of the {name}'s gradients", size, timeouts.update_s, "run.timeouts.update_s")


def describe_bytes(size: float) -> str:
    """`12.3 GB`, `1.25 GB`, `269 MB`."""
    if size >= 10e9:
        return f"{size / 1e9:,.1f} GB"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _names(config: JobConfig) -> list[str]:
    return ["policy", "critic"] if isinstance(config, PPOJob) else [config.role.name]


def _trained(config: JobConfig) -> Iterator[tuple[Policy | Critic | RewardModel, ModelShape]]:
    if isinstance(config, PPOJob):
        yield config.policy, read_shape(config.policy.model)
        critic = config.reward_models[0].model if config.critic.init_from == "reward" else config.critic.init_from
        yield config.critic, read_shape(critic).with_head("scalar")
    else:
        head: Head = "scalar" if config.role.name == "reward" else "vocabulary"
        yield config.role.trained, read_shape(config.role.trained.model).with_head(head)


def _checkpoint_bytes(section: Policy | Critic | RewardModel, shape: ModelShape) -> int:
    return _trained_parameters(section, shape) * (_BYTES[section.engine.dtype] + _ADAM_BYTES)


def _trained_parameters(section: Policy | Critic | RewardModel, shape: ModelShape) -> int:
    return shape.parameters if section.lora is None else sum(adapter_sizes(shape, section.lora))


def _checkpoints(config: JobConfig) -> int:
    """How many there are at most at a time."""
    run = config.run
    # The newest is complete before the oldest goes.
    kept = run.keep_last + (run.keep_best is not None) + 1
    if isinstance(run, EpochRun) and run.patience is not None:  # each new best gets one
        return kept
    if not run.checkpoint_every:
        return 1
    return min(kept, math.ceil(run.steps / run.checkpoint_every)) if isinstance(run, PPORun) else kept
