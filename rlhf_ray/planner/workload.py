"""What a job asks of its roles, from its config and the shapes of its models."""

import math
from dataclasses import dataclass

from rlhf_ray.config.jobs import JobConfig, PPOJob, PreferenceJob, RewardModelJob, SFTJob
from rlhf_ray.config.placement import RolePlacement, RolloutPlacement
from rlhf_ray.config.rewards import FunctionReward, ModelReward, part_name
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


def lengths_of(job: JobConfig, prompt: float | None = None, response: float | None = None) -> Lengths:
    """Of a job.

    Args:
        prompt, response: mean tokens of prompts and responses, in a job over a data set of what is not learnt of a row
            and of what is (of a pair's answers each). By default the longest that the config allows; of a pair, the
            prompt then has half of them.
    """
    if isinstance(job, PPOJob):
        most, longest = job.max_prompt_tokens, job.rollout.sampling.max_new_tokens
    elif isinstance(job, PreferenceJob):
        most, longest = job.data.max_tokens // 2, job.data.max_tokens - job.data.max_tokens // 2
    else:
        most, longest = 0, job.data.max_tokens
    return Lengths(most if prompt is None else prompt, longest if response is None else response, longest)


@dataclass(frozen=True)
class Batch:
    """The samples or rows of one step.

    Attributes:
        samples: in a step.
        longest: tokens of the longest; of all texts of a row together.
        learnt: of these, at which the vocabulary head is applied at most.
        optimizer_steps: that the samples of a step are split into.
        epochs: passes over the samples of a step.
        shard: samples that are scored together.
    """

    samples: int
    longest: int
    learnt: int
    optimizer_steps: int = 1
    epochs: int = 1
    shard: int | None = None

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
        seat: under which `JobConfig.places` has it.
        key: path of its section in the config.
        shape: of its model, with the head that it has here.
        placement: where its ranks sit.
        ranks: processes.
        entropy: its loss has an entropy bonus.
        scores: it also computes log-probs or values before the update.
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
    entropy: bool = False
    scores: bool = False
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

    job: JobConfig
    roles: tuple[Role, ...]
    text_workers: int
    trajectory_bytes: int


def workload_of(job: JobConfig) -> Workload:
    """What a job asks of its roles.

    Raises:
        ShapeError: when the shape of one of its models can't be read.
    """
    if isinstance(job, PPOJob):
        return _ppo(job)
    return _preference(job) if isinstance(job, PreferenceJob) else _epochs(job)


def _check_heads(shape: ModelShape, parts: int, key: str) -> None:
    if not can_share_heads(shape, parts):
        raise ShapeError(
            key,
            f"{parts} can't share the {shape.heads} attention heads and {shape.kv_heads} key/value heads of "
            f"{shape.model!r} evenly",
        )


def _ppo(job: PPOJob) -> Workload:
    prompt, response = job.max_prompt_tokens, job.rollout.sampling.max_new_tokens
    batch = Batch(
        samples=job.samples_per_step,
        longest=prompt + response,
        learnt=response,
        optimizer_steps=job.algorithm.optimizer_steps,
        epochs=job.algorithm.epochs,
        shard=job.rollout.shard_samples,
    )
    place = job.placement
    policy = read_shape(job.policy.model)
    _check_heads(policy, place.rollout.tensor_parallel, "placement.rollout.tensor_parallel")
    bucket = job.rollout.sync_bucket_bytes(on_gpu=place.gpus_of("rollout") > 0)
    critic = job.reward_models[0].model if job.critic.init_from == "reward" else job.critic.init_from
    roles: list[Role] = [
        TrainedRole(
            name="policy",
            seat="policy",
            key="policy",
            shape=policy.with_head("vocabulary"),
            engine=job.policy.engine,
            lora=job.policy.lora,
            placement=place.policy,
            ranks=place.ranks_of("policy"),
            batch=batch,
            entropy=job.algorithm.entropy_coef > 0,
            scores=True,
            sync_bytes=bucket,
        ),
        TrainedRole(
            name="critic",
            seat="critic",
            key="critic",
            shape=read_shape(critic).with_head("scalar"),
            engine=job.critic.engine,
            lora=job.critic.lora,
            placement=place.critic,
            ranks=place.ranks_of("critic"),
            batch=batch,
            scores=True,
        ),
    ]
    if not job.policy_is_reference:
        reference = job.policy.model if job.reference.from_model == "policy" else job.reference.from_model
        shape = read_shape(reference).with_head("vocabulary")
        ranks = place.ranks_of("reference")
        roles.append(
            ScoredRole(
                "reference", "reference", "reference", shape, job.reference.engine, place.reference, ranks, batch
            )
        )
    for number, part in enumerate(job.reward):
        if isinstance(part, ModelReward):
            shape, ranks = read_shape(part.model).with_head("scalar"), place.ranks_of("reward")
            name = f"reward-{part_name(part)}"
            roles.append(ScoredRole(name, "reward", f"reward.{number}", shape, part.engine, place.reward, ranks, batch))
    adapters = job.policy.lora.rank if job.policy.lora and job.rollout.lora_sync == "adapters" else 0
    roles.append(
        RolloutRole(
            name="rollout",
            seat="rollout",
            key="rollout",
            shape=policy.with_head("vocabulary"),
            dtype=job.rollout.engine.dtype or job.policy.engine.dtype,
            engine=job.rollout.engine,
            placement=place.rollout,
            batch=batch,
            sync_bytes=bucket,
            adapter_rank=adapters,
        )
    )
    texts = [part for part in job.reward if not isinstance(part, ModelReward)]
    workers = sum(part.workers if isinstance(part, FunctionReward) else 1 for part in texts)
    return Workload(job, tuple(roles), workers, batch.samples * _trajectory_bytes(prompt, response))


def _reference(model: str, engine: ScoringEngine, place: RolePlacement, ranks: int, batch: Batch) -> ScoredRole:
    shape = read_shape(model).with_head("vocabulary")
    return ScoredRole("reference", "reference", "reference", shape, engine, place, ranks, batch)


def _trajectory_bytes(prompt: int, response: int) -> int:
    """Of one sample: tokens, the engine's log-probs and weight versions; what roles compute of it, by response token
    (log-probs of policy and reference, values, then `TrainingColumns`); and some hundred bytes of names and offsets.
    Trajectories are there twice, in shards and in portions, while the critic makes these."""
    arrays, columns = 4 * prompt + 3 * 4 * response, (3 + 4) * 4 * response
    return 2 * (arrays + 256) + columns


def _preference(job: PreferenceJob) -> Workload:
    # A row of pairs is a prompt and two answers; how long the prompt is, only the data know.
    longest = job.data.max_tokens * (1 if job.kind == "labels" else 2)
    batch = Batch(samples=job.data.rows_per_step, longest=longest, learnt=longest)
    roles: list[Role] = [
        TrainedRole(
            name="policy",
            seat="policy",
            key="policy",
            shape=read_shape(job.policy.model).with_head("vocabulary"),
            engine=job.policy.engine,
            lora=job.policy.lora,
            placement=job.placement.policy,
            ranks=job.trained.ranks,
            batch=batch,
            scores=job.policy_is_reference,
        )
    ]
    if job.algorithm.needs_reference and not job.policy_is_reference and job.reference.cache is None:
        shape, ranks = read_shape(job.reference_model).with_head("vocabulary"), job.placement.reference_ranks
        place = job.placement.reference
        roles.append(
            ScoredRole("reference", "reference", "reference", shape, job.reference.engine, place, ranks, batch)
        )
    return Workload(job, tuple(roles), 0, batch.samples * longest * 4)


def _epochs(job: RewardModelJob | SFTJob) -> Workload:
    role, texts = job.role, 2 if isinstance(job, RewardModelJob) else 1
    longest = job.data.max_tokens * texts
    # A reward model's head is applied at the last token of each text.
    learnt = texts if isinstance(job, RewardModelJob) else longest
    trained = TrainedRole(
        name=role.name,
        seat=role.name,
        key=role.name,
        shape=read_shape(role.trained.model).with_head("scalar" if isinstance(job, RewardModelJob) else "vocabulary"),
        engine=role.trained.engine,
        lora=role.trained.lora,
        placement=role.placement,
        ranks=role.ranks,
        batch=Batch(samples=role.rows_per_step, longest=longest, learnt=learnt),
    )
    return Workload(job, (trained,), 0, role.rows_per_step * longest * 4)
