"""What a job asks of its roles, from its config and the shapes of its models."""

import math
from dataclasses import dataclass, fields

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.placement import RolePlacement, RolloutPlacement
from rlhf_ray.config.roles import RoleSpec, StepShape
from rlhf_ray.config.rollout import RolloutEngine
from rlhf_ray.config.training import Dtype, Lora, ScoringEngine, TrainingEngine
from rlhf_ray.models.config_json import read_shape
from rlhf_ray.models.shapes import ModelShape, ShapeError, can_share_heads
from rlhf_ray.planner.activation_memory import ITEMSIZE, Pack

_GOLDEN = (math.sqrt(5) - 1) / 2


MIB = 2**20


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and responses. Each token of a response is the last with the same probability, until the
    longest response is cut off.

    Attributes:
        prompt: mean of prompts.
        response: mean of responses; at least `longest` means that all are that long.
        longest: response.
    """

    prompt: float
    response: float
    longest: int

    def responses(self, number: int) -> list[float]:
        """Lengths of so many responses: evenly spaced quantiles, in an order that is as mixed as chance."""
        ending = self._ending
        shares = ((0.5 + place * _GOLDEN) % 1.0 for place in range(number))
        return [min(self.longest, -math.log1p(-share) / ending) if ending else self.longest for share in shares]

    @property
    def _ending(self) -> float:
        """Rate at which responses end by themselves, for which their mean is right."""
        if self.response >= self.longest:
            return 0.0
        low, high = 0.0, 1.0 / self.response  # at the upper end the mean would be right without a cut
        for _ in range(60):
            middle = (low + high) / 2
            mean = -math.expm1(-middle * self.longest) / middle
            low, high = (middle, high) if mean > self.response else (low, middle)
        return (low + high) / 2


def lengths_of(job: Job, prompt: float | None = None, response: float | None = None) -> Lengths:
    """Of a job.

    Args:
        prompt, response: mean tokens of prompts and responses, in a job over a data set of what is not learnt of a row
            and of what is (of a pair's answers each). By default the longest that the config allows; of a pair, the
            prompt then has half of them.
    """
    most, longest = job.step_shape.prompt, job.step_shape.response
    return Lengths(most if prompt is None else prompt, longest if response is None else response, longest)


class Batch(StepShape):
    """The samples or rows of one step, packed for passes."""

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
        return Pack(tokens, -(-tokens * self.learnt // self.longest)).part(engine.sequence_parallel)


@dataclass(frozen=True)
class TrainedRole:
    """A role that DeepSpeed trains.

    Attributes:
        name: policy, critic or reward.
        seat: under which `Job.places` has it.
        key: path of its section in the config.
        shape: of its model, with the head that it has here.
        placement: where its ranks sit.
        ranks: processes.
        entropy: its loss has an entropy bonus.
        exported: its model is the job's result.
        score_passes: over the step's samples that it makes before the update.
        sync_bytes: bucket of the weights that it sends to the engines; 0 when it sends none.
    """

    name: str
    seat: str
    key: str
    shape: ModelShape
    engine: TrainingEngine
    lora: Lora | None
    placement: RolePlacement
    ranks: int
    batch: Batch
    exported: bool = False
    score_passes: int = 0
    entropy: bool = False
    sync_bytes: int = 0

    @property
    def loaded_bytes(self) -> int:
        """What one rank reads of its model before it goes to its device; with ZeRO-3 its own part."""
        return _loaded_bytes(self.shape, self.engine, self.ranks)


@dataclass(frozen=True)
class ScoredRole:
    """A role that only computes forward passes: reference and reward models."""

    name: str
    seat: str
    key: str
    shape: ModelShape
    engine: ScoringEngine
    placement: RolePlacement
    ranks: int
    batch: Batch
    score_passes: int

    @property
    def loaded_bytes(self) -> int:
        """What one rank reads of its model before it goes to its device; with ZeRO-3 its own part."""
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
    seat: str
    key: str
    shape: ModelShape
    dtype: Dtype
    engine: RolloutEngine
    placement: RolloutPlacement
    batch: Batch
    sync_bytes: int
    adapter_rank: int


Role = TrainedRole | ScoredRole | RolloutRole


def _loaded_bytes(shape: ModelShape, engine: TrainingEngine | ScoringEngine, ranks: int) -> int:
    return shape.parameters * ITEMSIZE[engine.dtype] // (ranks if engine.zero_stage == 3 else 1)


@dataclass(frozen=True)
class Workload:
    """A whole job.

    Attributes:
        roles: in the order in which they are placed.
        text_workers: processes of reward functions and services.
        trajectory_bytes: of one step, in Ray's object store.
    """

    job: Job
    roles: tuple[Role, ...]
    text_workers: int
    trajectory_bytes: int


def workload_of(job: Job) -> Workload:
    """What a job asks of its roles.

    Raises:
        ShapeError: when the shape of one of its models can't be read.
    """
    shape = job.step_shape
    batch = Batch(**{field.name: getattr(shape, field.name) for field in fields(StepShape)})
    [dtype] = [role.engine.dtype for role in job.roles if role.exported and isinstance(role.engine, TrainingEngine)]
    roles = [_role(role, batch, dtype) for role in job.roles if role.trained or role.kind == "engine" or _scores(role)]
    return Workload(
        job=job,
        roles=tuple(roles),
        text_workers=sum(role.ranks for role in job.roles if role.kind == "texts"),
        trajectory_bytes=batch.samples
        * (_trajectory_bytes(batch.prompt, batch.response) if _generates(job) else 4 * batch.longest),
    )


def _generates(job: Job) -> bool:
    return any(role.kind == "engine" for role in job.roles)


def _scores(role: RoleSpec) -> bool:
    return role.model is not None and role.score_passes > 0


def _role(role: RoleSpec, batch: Batch, dtype: Dtype) -> Role:
    """`dtype` is that of the model that the job trains, which engines have too."""
    assert role.model is not None
    shape = read_shape(role.model.path).with_head("scalar" if role.kind == "scalar" else "vocabulary")
    if isinstance(role.placement, RolloutPlacement):
        assert isinstance(role.engine, RolloutEngine)
        _check_heads(shape, role.placement.tensor_parallel, "placement.rollout.tensor_parallel")
        return RolloutRole(
            name=role.name,
            seat=role.placed_as,
            key=role.section,
            shape=shape,
            dtype=role.engine.dtype or dtype,
            engine=role.engine,
            placement=role.placement,
            batch=batch,
            sync_bytes=role.sync_bytes,
            adapter_rank=role.adapter_rank,
        )
    assert role.placement is not None
    if isinstance(role.engine, ScoringEngine):
        return ScoredRole(
            role.name,
            role.placed_as,
            role.section,
            shape,
            role.engine,
            role.placement,
            role.ranks,
            batch,
            role.score_passes,
        )
    assert isinstance(role.engine, TrainingEngine)
    return TrainedRole(
        name=role.name,
        seat=role.placed_as,
        key=role.section,
        shape=shape,
        engine=role.engine,
        lora=role.lora,
        placement=role.placement,
        ranks=role.ranks,
        batch=batch,
        exported=role.exported,
        score_passes=role.score_passes,
        entropy=role.entropy,
        sync_bytes=role.sync_bytes,
    )


def _check_heads(shape: ModelShape, parts: int, key: str) -> None:
    if not can_share_heads(shape, parts):
        raise ShapeError(
            key,
            f"{parts} can't share the {shape.heads} attention heads and {shape.kv_heads} key/value heads of "
            f"{shape.model!r} evenly",
        )


def _trajectory_bytes(prompt: int, response: int) -> int:
    """Of one sample: tokens, the engine's log-probs and weight versions; what roles compute of it, by response token
    (log-probs of policy and reference, values, then `TrainingColumns`); and some hundred bytes of names and offsets.
    Trajectories are there twice, in shards and in portions, while the critic makes these."""
    arrays, columns = 4 * prompt + 3 * 4 * response, (3 + 4) * 4 * response
    return 2 * (arrays + 256) + columns
