"""What a job asks of its roles, from its config and the shapes of its models."""

from rlhf_ray.cluster.planner.errors import PlanError
from rlhf_ray.cluster.planner.folders import read_shape
from rlhf_ray.cluster.planner.roles import Batch, Role, RolloutRole, ScoredRole, TrainedRole, Workload
from rlhf_ray.cluster.planner.shapes import ModelShape, can_share_heads
from rlhf_ray.config.jobs import JobConfig, PPOJob, PreferenceJob, RewardModelJob, SFTJob
from rlhf_ray.config.placement import RolePlacement
from rlhf_ray.config.rewards import FunctionReward, ModelReward, part_name
from rlhf_ray.config.training import ScoringEngine

MIB = 2**20


def workload_of(job: JobConfig) -> Workload:
    """What a job asks of its roles.

    Raises:
        PlanError: when the shape of one of its models can't be read.
    """
    if isinstance(job, PPOJob):
        return _ppo(job)
    return _preference(job) if isinstance(job, PreferenceJob) else _epochs(job)


def _check_heads(shape: ModelShape, parts: int, key: str) -> None:
    if not can_share_heads(shape, parts):
        raise PlanError(
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
    bucket = job.rollout.sync_bucket_mib * MIB
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
            dtype=job.rollout.engine.dtype,
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
            ranks=job.role.ranks,
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
