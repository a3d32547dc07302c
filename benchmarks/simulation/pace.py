"""How long the work of simulated actors takes: as long as the planner says that the real work would."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:  # the actors, which get a pace, don't need them
    from rlhf_ray.config.jobs import PPOJob
    from rlhf_ray.planner.step_time import StepTime
    from rlhf_ray.planner.work import Lengths


@dataclass(frozen=True)
class Pace:
    """Seconds of work.

    Attributes:
        token_s: a token of each sequence that an engine decodes.
        sequences: that an engine decodes at a time.
        forward_s, update_s: a token on one rank.
        sync_s: a weight sync.
    """

    token_s: float
    sequences: int
    forward_s: float
    update_s: float
    sync_s: float

    @classmethod
    def of(cls, step: "StepTime", config: "PPOJob", lengths: "Lengths", speed: float = 1.0) -> Self:
        """The pace of a step whose times the planner knows, `speed` times as fast."""
        sequences = config.rollout.engine.max_num_seqs
        each = -(-config.samples_per_step // config.placement.rollout.engines)
        # Of one role: all that it does is scoring, and the updates of the two that are trained are alike.
        scoring_s = step.busy_s["reference"]
        tokens = config.samples_per_step * (lengths.prompt + lengths.response)
        on_rank = tokens / config.placement.ranks_of("policy") * speed
        return cls(
            token_s=step.phases["generate"] / (-(-each // sequences) * lengths.longest) / speed,
            sequences=sequences,
            forward_s=scoring_s / on_rank,
            update_s=step.phases["policy_update"] / on_rank,
            sync_s=step.phases["weight_sync"] / speed,
        )
