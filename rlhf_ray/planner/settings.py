"""How the models of roles that share devices can be held: what trades memory for time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from rlhf_ray.planner.workload import Role, RolloutRole, ScoredRole, TrainedRole


@dataclass(frozen=True)
class Setting:
    """The same for all roles of a group.

    Attributes:
        zero_stage: of roles that learn.
        scoring_stage: of roles that only score.
        micro_batch: tokens of a micro-batch ÷ those that the config asks for; never fewer than the longest sample has.
    """

    zero_stage: Literal[1, 2, 3] = 2
    offload_optimizer: bool = False
    activation_checkpointing: bool = False
    scoring_stage: Literal[0, 3] = 0
    micro_batch: float = 1.0

    def keys_of(self, role: Role) -> dict[str, Any]:
        """Of the section `engine` of a role."""
        if isinstance(role, RolloutRole):
            return {}
        tokens = max(role.batch.longest, int(role.engine.micro_batch_tokens * self.micro_batch))
        if isinstance(role, ScoredRole):
            parameters = role.engine.offload_parameters if self.scoring_stage == 3 else "none"
            return {
                "zero_stage": self.scoring_stage,
                "offload_parameters": parameters,
                "nvme_path": role.engine.nvme_path if parameters == "nvme" else None,
                "micro_batch_tokens": tokens,
            }
        parameters = role.engine.offload_parameters if self.zero_stage == 3 else "none"
        return {
            "zero_stage": self.zero_stage,
            "offload_optimizer": "cpu" if self.offload_optimizer else "none",
            "offload_parameters": parameters,
            "nvme_path": role.engine.nvme_path if parameters == "nvme" else None,
            "activation_checkpointing": self.activation_checkpointing,
            "micro_batch_tokens": tokens,
        }

    def applied(self, role: TrainedRole | ScoredRole) -> TrainedRole | ScoredRole:
        """The role, held so."""
        if isinstance(role, TrainedRole):
            return replace(role, engine=role.engine.model_copy(update=self.keys_of(role)))
        return replace(role, engine=role.engine.model_copy(update=self.keys_of(role)))

    def takes_no_less_than(self, other: "Setting") -> bool:
        """Whether it can fit nowhere where `other` does not."""
        return (
            self.zero_stage <= other.zero_stage
            and self.offload_optimizer <= other.offload_optimizer
            and self.activation_checkpointing <= other.activation_checkpointing
            and self.scoring_stage <= other.scoring_stage
            and self.micro_batch >= other.micro_batch
        )


def settings(*, ranks: int, scores: bool, learns: bool, leaves: bool, on_devices: bool) -> Iterator[Setting]:
    """All that make sense.

    Args:
        ranks: of the roles; one has nobody to share with.
        scores, learns: whether such roles are in the group.
        leaves: they leave their devices to each other, which shards of models that only score can't.
        on_devices: with host memory beside them, to which something can be offloaded.
    """
    stages: tuple[Literal[1, 2, 3], ...] = (1, 2, 3) if learns and ranks > 1 else (2,)
    scoring: tuple[Literal[0, 3], ...] = (0, 3) if scores and ranks > 1 and not leaves else (0,)
    offload = (False, True) if learns and on_devices else (False,)
    checkpointing = (False, True) if learns else (False,)
    micro_batches = (4.0, 2.0, 1.0, 0.5, 0.25)
    for stage, off, again, scored, micro in product(stages, offload, checkpointing, scoring, micro_batches):
        yield Setting(stage, off, again, scored, micro)
