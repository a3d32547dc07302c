"""The roles of a job that hold a model: rows of the role table, with the shapes of their models.

Lengths are the longest that the config allows, so what is planned from them is the most that a run can need.
"""

from dataclasses import dataclass

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.placement import RolePlacement, RolloutPlacement
from rlhf_ray.config.roles import RoleSpec, StepShape
from rlhf_ray.config.rollout import RolloutEngine
from rlhf_ray.config.training import ScoringEngine, TrainingEngine
from rlhf_ray.models.shapes import ModelShape
from rlhf_ray.planner.activation_memory import Pack
from rlhf_ray.planner.footprint import StepPhase


@dataclass(frozen=True, kw_only=True)
class _LoadedRole(RoleSpec):
    """A row of the role table.

    Attributes:
        shape: of its model, with the head that it has here.
        step: what it is fed with.
    """

    shape: ModelShape
    step: StepShape


@dataclass(frozen=True, kw_only=True)
class _RankedRole(_LoadedRole):
    """A role whose ranks compute with torch."""

    engine: TrainingEngine | ScoringEngine
    placement: RolePlacement

    @property
    def score_pack(self) -> Pack:
        """One rank's part of the largest micro-batch of a forward pass over a shard."""
        shard = min(self.step.shard or self.step.samples, self.step.samples)
        return self._pack(-(-shard * self.engine.sequence_parallel // self.ranks))

    def _pack(self, rows: int) -> Pack:
        """Of the largest micro-batch that can be made of so many rows, the part of one rank of those that share it."""
        longest, learnt, sp_size = self.step.longest, self.step.learnt, self.engine.sequence_parallel
        tokens = max(longest, min(self.engine.micro_batch_tokens, rows * longest))
        positions = -(-tokens * learnt // longest)
        return Pack(-(-tokens // sp_size), -(-positions // sp_size))


@dataclass(frozen=True, kw_only=True)
class TrainedRole(_RankedRole):
    """A role that DeepSpeed trains."""

    engine: TrainingEngine

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one rank in one optimizer step, when all samples are longest."""
        return -(-self._rows // max(1, self.engine.micro_batch_tokens // self.step.longest))

    @property
    def train_pack(self) -> Pack:
        """One rank's part of the largest micro-batch of an update."""
        return self._pack(self._rows)

    @property
    def _rows(self) -> int:
        """Samples of an optimizer step, of which each rank, or those that share sequences together, have so many."""
        return -(-self.step.samples * self.engine.sequence_parallel // (self.step.optimizer_steps * self.ranks))


@dataclass(frozen=True, kw_only=True)
class ScoredRole(_RankedRole):
    """A role that only computes forward passes: reference and reward models."""

    engine: ScoringEngine


@dataclass(frozen=True, kw_only=True)
class RolloutRole(_LoadedRole):
    """The rollout engines."""

    engine: RolloutEngine
    placement: RolloutPlacement


ModelRole = TrainedRole | ScoredRole | RolloutRole


@dataclass(frozen=True)
class Workload:
    """A whole job.

    Attributes:
        roles: that hold a model, in the order of the role table.
        phases: of a step, in order, that count for memory.
        updated: roles that learn, in the order in which the controller updates them.
        text_workers: processes of reward functions and services.
        trajectory_bytes: of one step, in Ray's object store.
    """

    job: Job
    roles: tuple[ModelRole, ...]
    phases: tuple[StepPhase, ...]
    updated: tuple[str, ...]
    text_workers: int
    trajectory_bytes: int

    @property
    def rollout(self) -> RolloutRole | None:
        """The rollout engines; None in a job over a data set."""
        return next((role for role in self.roles if isinstance(role, RolloutRole)), None)
