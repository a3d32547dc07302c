"""A shard: samples that move together from the engine that drew them to the roles that score them.

Nothing here needs torch: what is sent to an actor is not to import it there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray
from numpy.typing import NDArray

from rlhf_ray.data.trajectory import TrajectoryBatch

Refs = Sequence[ray.ObjectRef]


@dataclass(frozen=True)
class ShardFacts:
    """What the controller knows of a shard: numbers per sample, no tokens.

    Attributes:
        uids: `[samples]`.
        sample_index: `[samples]`.
        prompt_lengths, response_lengths: tokens, int64 `[samples]`.
        action_lengths: response tokens that the policy chose itself, int64 `[samples]`.
        truncated: bool `[samples]`.
        version_lag: sum over response tokens of versions that the sampling weights were behind the newest.
    """

    uids: tuple[str, ...]
    sample_index: NDArray[np.int32]
    prompt_lengths: NDArray[np.int64]
    response_lengths: NDArray[np.int64]
    action_lengths: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    version_lag: int

    @classmethod
    def of(cls, batch: TrajectoryBatch, version: int) -> "ShardFacts":
        """Of a shard; `version` is the newest of the policy."""
        return cls(
            batch.uids,
            batch.sample_index,
            batch.prompt_lengths,
            batch.response_lengths,
            batch.action_lengths,
            batch.truncated,
            int((version - batch.weight_versions).sum()),
        )


@dataclass(frozen=True)
class GeneratedShard:
    """A shard that is complete.

    Attributes:
        number: of the shard within the step.
        shards: of the step.
        trajectories: reference to its `TrajectoryBatch`.
        facts: its numbers per sample.
    """

    number: int
    shards: int
    trajectories: ray.ObjectRef
    facts: ShardFacts


@dataclass(frozen=True)
class ScoredColumns:
    """References to what roles made of some generated shards in a row: for each shard, the parts of a column.

    Attributes:
        trajectories: one for each shard.
        old_logprobs, reference_logprobs: of policy and reference.
        values: of the critic; None without one.
    """

    trajectories: Refs
    old_logprobs: Sequence[Refs]
    reference_logprobs: Sequence[Refs]
    values: Sequence[Refs] | None
