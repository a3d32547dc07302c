"""Plugs of an algorithm: names that a config can choose from, each with what it asks of the job.

A plug is chosen by a name of ours or as `package.module:NAME`, which is imported wherever it is needed. What it
computes stands in a function that is named by its path, so that reading a config imports no torch.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from rlhf_ray.config.base import shown, suggestion

PlugT = TypeVar("PlugT")
OptionalColumn = Literal["engine_logprobs", "reference_logprobs"]


@dataclass(frozen=True)
class Estimator:
    """An advantage estimator.

    Attributes:
        function: path of a `TokenEstimator` where `per_token`, else of a `SampleEstimator` (algorithms/estimators.py).
        per_token: it takes rewards per token; else the return of each whole sample.
        values: it needs those of a critic, which a job has for it alone.
        groups: it compares the samples of one prompt, so there must be several.
        whitened: advantages are whitened over the batch unless the config says otherwise.
    """

    function: str
    per_token: bool = False
    values: bool = False
    groups: bool = False
    whitened: bool = False


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss.

    Attributes:
        function: path of a function of `PolicyLossInputs` and `PolicyLossOptions` (algorithms/policy_loss.py).
        columns: that it reads beside the log-probs of the policy, now and before the update, and the advantages.
    """

    function: str
    columns: tuple[OptionalColumn, ...] = ()


ESTIMATORS: dict[str, Estimator] = {
    "gae": Estimator("rlhf_ray.algorithms.estimators:gae_of_tokens", per_token=True, values=True, whitened=True),
    "grpo": Estimator("rlhf_ray.algorithms.estimators:grpo", groups=True),
    "rloo": Estimator("rlhf_ray.algorithms.estimators:rloo", groups=True),
}

POLICY_LOSSES: dict[str, PolicyLoss] = {
    "clipped": PolicyLoss("rlhf_ray.algorithms.policy_loss:clipped_policy_loss"),
}


def choose(key: str, name: str, own: Mapping[str, PlugT], kind: type[PlugT]) -> PlugT:
    """The plug of a name.

    Args:
        key: that names it, for errors, with a leading dot.
        own: those that have a short name.
        kind: class of all of them.

    Raises:
        ValueError: there is none.
    """
    if name in own:
        return own[name]
    if ":" not in name:
        raise ValueError(f"{key}: {name!r} is not known; {suggestion(name, own, more=', or package.module:NAME')}")
    found = import_named(key, name)
    if not isinstance(found, kind):
        raise ValueError(f"{key}: {name!r} is of type {type(found).__name__}, not {kind.__name__}")
    return found


def import_named(key: str, path: str) -> Any:
    """The object that a setting names by its path. Raises ValueError: a module of somebody else's may fail in any
    way."""
    try:
        return imported(path)
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{key}: {shown(path)} can't be imported: {said}") from None


@cache
def imported(path: str) -> Any:
    """The object that `package.module:NAME` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
