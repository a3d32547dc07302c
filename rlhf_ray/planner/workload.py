"""The roles of a job: which model each has, how it is held, and with how much at a time it is fed.

Lengths are the longest that the config allows, so what is planned from them is the most that a run can need.
"""

from dataclasses import dataclass

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.placement import RolePlacement, RolloutPlacement
from rlhf_ray.config.rollout import RolloutEngine
from rlhf_ray.config.training import Dtype, Lora, ScoringEngine, TrainingEngine
from rlhf_ray.models.shapes import ModelShape
from rlhf_ray.planner.activation_memory import ITEMSIZE, Pack
from rlhf_ray.planner.footprint import StepPhase


@dataclass(frozen=True)
class StepBatch:
    """The samples or rows of one step.

    Attributes:
        samples: in a step.
        longest: tokens of the longest; of all texts of a row together.
        learnt: of these, at which the vocabulary head is applied at most.
        optimizer_steps: that the samples of a step are split into.
        epochs: passes over the samples of a step.
        shard: samples that are scored together.
        samples_per_prompt: that are generated, so that its keys and values are computed once.
    """

    samples: int
    longest: int
    learnt: int
    optimizer_steps: int = 1
    epochs: int = 1
    shard: int | None = None
    samples_per_prompt: int = 1

    def micro_batches(self, engine: TrainingEngine, ranks: int) -> int:
        """Micro-batches of one rank in one optimizer step, when all samples are longest."""
        return -(-self._rows(engine, ranks) // max(1, engine.micro_batch_tokens // self.longest))

    def train_pack(self, engine: TrainingEngine, ranks: int) -> Pack:
        """One rank's part of the largest micro-batch of an update."""
        return self._pack(self._rows(engine, ranks), engine)

    def score_pack(self, engine: TrainingEngine | ScoringEngine, ranks: int) -> Pack:
        """One rank's part of the largest micro-batch of a forward pass over a shard."""
        shard = min(self.shard or self.samples, self.samples)
        return self._pack(-(-shard * engine.sequence_parallel // ranks), engine)

    def _rows(self, engine: TrainingEngine, ranks: int) -> int:
        return -(-self.samples * engine.sequence_parallel // (self.optimizer_steps * ranks))

    def _pack(self, rows: int, engine: TrainingEngine | ScoringEngine) -> Pack:
        tokens = max(self.longest, min(engine.micro_batch_tokens, rows * self.longest))
        return Pack(tokens, -(-tokens * self.learnt // self.longest)).per_rank(engine.sequence_parallel)


@dataclass(frozen=True)
class TrainedRole:
    """A role that DeepSpeed trains.

    Attributes:
        name: policy, critic or reward.
        placement_key: of its section under `placement`; reward models share one.
        key: path of its section in the config.
        shape: of its model, with the head that it has here.
        placement: that section.
        ranks: processes.
        entropy: its loss has an entropy bonus.
        score_passes: forward passes over the samples of a step, before the update.
        sync_bytes: bucket of the weights that it sends to the engines; 0 when it sends none.
    """

    name: str
    placement_key: str
    key: str
    shape: ModelShape
    engine: TrainingEngine
    lora: Lora | None
    placement: RolePlacement
    ranks: int
    batch: StepBatch
    entropy: bool = False
    score_passes: int = 0
    sync_bytes: int = 0

    @property
    def loaded_bytes(self) -> int:
        """What one rank reads of its model before it goes to its device; with ZeRO-3 its own shard."""
        return _loaded_bytes(self.shape, self.engine, self.ranks)


@dataclass(frozen=True)
class ScoredRole:
    """A role that only computes forward passes: reference and reward models.

    Attributes:
        score_passes: over the samples of a step.
    """

    name: str
    placement_key: str
    key: str
    shape: ModelShape
    engine: ScoringEngine
    placement: RolePlacement
    ranks: int
    batch: StepBatch
    score_passes: int = 1

    @property
    def loaded_bytes(self) -> int:
        """What one rank reads of its model before it goes to its device; with ZeRO-3 its own shard."""
        return _loaded_bytes(self.shape, self.engine, self.ranks)


@dataclass(frozen=True)
class RolloutRole:
    """The rollout engines.

    Attributes:
        dtype: of their weights.
        batch: what all engines together generate in a step.
        sync_bytes: bucket of the weights that they receive.
        adapter_rank: of the adapters that they apply beside the base model, 0 for none.
    """

    name: str
    placement_key: str
    key: str
    shape: ModelShape
    dtype: Dtype
    engine: RolloutEngine
    placement: RolloutPlacement
    batch: StepBatch
    sync_bytes: int
    adapter_rank: int


ModelRole = TrainedRole | ScoredRole | RolloutRole


def _loaded_bytes(shape: ModelShape, engine: TrainingEngine | ScoringEngine, ranks: int) -> int:
    return shape.parameters * ITEMSIZE[engine.dtype] // (ranks if engine.zero_stage == 3 else 1)


@dataclass(frozen=True)
class Workload:
    """A whole job.

    Attributes:
        roles: in the order in which they are placed.
        phases: of a step, in order.
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
