"""Records whose modules import torch, made where they arrive.

A simulated actor has no torch: a hundred processes that had would not fit into a machine's memory.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


class MadeThere:
    """Pickles as the call of a function of this module."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        self._call = (make, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def score_part(samples: tuple[int, ...], scores: np.ndarray) -> Any:
    """A `ScorePart`."""
    from rlhf_ray.actors.reward import ScorePart

    return ScorePart(samples, scores)


def training_shard_report(tokens: int, kl: np.ndarray) -> Any:
    """A `TrainingShardReport` of advantages, values and returns that are all 0."""
    from rlhf_ray.actors.training_shards import TrainingShardReport
    from rlhf_ray.algorithms.moments import Moments
    from rlhf_ray.algorithms.value_loss import ExplainedVariance

    zeros = Moments(float(tokens), 0.0, 0.0)
    return TrainingShardReport(
        kl, penalty=kl, mismatch=0.0, advantages=zeros, explained_variance=ExplainedVariance(zeros, zeros)
    )


def update_report(names: tuple[str, ...], steps: int, samples: int, seconds: float) -> Any:
    """An `UpdateReport` whose means are all 0."""
    from rlhf_ray.actors.trained import UpdateReport
    from rlhf_ray.telemetry.metrics import Mean

    means = {name: Mean(0.0, 1.0) for name in names}
    return UpdateReport(means, lr=0.0, optimizer_steps=steps, samples=samples, seconds=seconds)
