"""What a config asks of the nodes, beside bundles for its actors."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.roles import RoleSpec
from rlhf_ray.config.run import EpochRun, PPORun
from rlhf_ray.config.training import Dtype, TrainingEngine
from rlhf_ray.models.config_json import read_shape
from rlhf_ray.models.lora_sizes import adapter_sizes
from rlhf_ray.models.shapes import ModelShape

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


def modules_and_variables(config: Job) -> tuple[dict[str, str], dict[str, str]]:
    """Modules of a job of one's own and of what its roles import, and environment variables with the tokens of
    services, by their settings."""
    modules, variables = dict[str, str](), dict[str, str]()
    if ":" in config.job:
        modules["job"] = config.job.partition(":")[0]
    for role in config.roles:
        modules |= role.modules
        variables |= role.variables
    return modules, variables


def compiled_optimizers(config: Job) -> dict[str, str]:
    """Roles, by their section of `placement`, whose optimizer steps in host memory, with the settings for it: their
    nodes compile its kernel."""
    return {
        role.placed_as: f"{role.section}.engine.offload_optimizer"
        for role in config.roles
        if isinstance(role.engine, TrainingEngine) and role.engine.offload_optimizer != "none"
    }


def disk_need(config: Job) -> DiskNeed:
    """Room for checkpoints and exports.

    Raises:
        ShapeError: the size of a model can't be told from its config.json.
    """
    one = sum(_checkpoint_bytes(role) for role in config.roles if role.checkpointed)
    count = _checkpoints(config)
    what = f"{count} checkpoint{'s'[: count > 1]} of {describe_bytes(one)}"
    size = count * one
    if config.run.export:
        exported = sum(_weight_bytes(role) for role in config.roles if role.exported)
        # A new one is written beside the one that is there.
        copies = 2 if count > 1 else 1
        size += copies * exported
        what += f" and {copies} export{'s'[: copies > 1]} of {describe_bytes(exported)}"
    return DiskNeed(size, what)


def transfers(config: Job) -> Iterator[Transfer]:
    """What travels between nodes in each step, with its time limit.

    Raises:
        ShapeError: as `disk_need`.
    """
    timeouts = config.run.timeouts
    for role in config.roles:
        if role.kind == "engine":
            weights = sum(_weight_bytes(role) for role in config.roles if role.exported)
            yield Transfer("one weight sync", weights, timeouts.sync_s, "run.timeouts.sync_s")
    for role in config.roles:
        if role.trained:
            # An all-reduce sends every gradient once there and once back.
            size = 2 * _trained_parameters(role) * _BYTES[_dtype(role)]
            what = f"one reduction of the {role.name}'s gradients"
            yield Transfer(what, size, timeouts.update_s, "run.timeouts.update_s")


def describe_bytes(size: float) -> str:
    """`12.3 GB`, `1.25 GB`, `269 MB`."""
    if size >= 10e9:
        return f"{size / 1e9:,.1f} GB"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _shape(role: RoleSpec) -> ModelShape:
    assert role.model is not None
    return read_shape(role.model.path).with_head("scalar" if role.kind == "scalar" else "vocabulary")


def _dtype(role: RoleSpec) -> Dtype:
    assert role.engine is not None
    assert role.engine.dtype is not None
    return role.engine.dtype


def _weight_bytes(role: RoleSpec) -> int:
    return _shape(role).parameters * _BYTES[_dtype(role)]


def _checkpoint_bytes(role: RoleSpec) -> int:
    if not isinstance(role.engine, TrainingEngine):
        return _weight_bytes(role)
    return _trained_parameters(role) * (_BYTES[role.engine.dtype] + _ADAM_BYTES)


def _trained_parameters(role: RoleSpec) -> int:
    return _shape(role).parameters if role.lora is None else sum(adapter_sizes(_shape(role), role.lora))


def _checkpoints(config: Job) -> int:
    """How many there are at most at a time."""
    run = config.run
    # The newest is complete before the oldest goes.
    kept = run.keep_last + (run.keep_best is not None) + 1
    if isinstance(run, EpochRun) and run.patience is not None:  # each new best gets one
        return kept
    if not run.checkpoint_every:
        return 1
    return min(kept, math.ceil(run.steps / run.checkpoint_every)) if isinstance(run, PPORun) else kept
