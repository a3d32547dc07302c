"""What each type of job asks of its roles, and the phases of its step.

No other file of the planner looks at a job's type; the others read `Workload` and its roles.
"""

from rlhf_ray.config.jobs import JobConfig, PPOJob, PreferenceJob, RewardModelJob, SFTJob
from rlhf_ray.config.placement import RolePlacement
from rlhf_ray.config.rewards import FunctionReward, ModelReward, part_name
from rlhf_ray.config.training import ScoringEngine
from rlhf_ray.models.config_json import read_shape
from rlhf_ray.models.shapes import ModelShape, ShapeError, can_share_heads
from rlhf_ray.planner.calibration import MIB
from rlhf_ray.planner.work import Lengths, Sequences
from rlhf_ray.planner.workload import ModelRole, RolloutRole, ScoredRole, StepBatch, TrainedRole, Workload

_ANSWERS = 2
"""Answers of a row that are compared; rows of choices and rankings can have more."""


def workload_of(job: JobConfig) -> Workload:
    """What a job asks of its roles.

    Raises:
        ShapeError: when the shape of one of its models can't be read.
    """
    if isinstance(job, PPOJob):
        return _ppo(job)
    return _preference(job) if isinstance(job, PreferenceJob) else _epochs(job)


def _check_heads(shape: ModelShape, ranks: int, key: str) -> None:
    if not can_share_heads(shape, ranks):
        raise ShapeError(
            key,
            f"{ranks} can't share the {shape.heads} attention heads and {shape.kv_heads} key/value heads of "
            f"{shape.model!r} evenly",
        )


def _ppo(job: PPOJob) -> Workload:
    prompt, response = job.max_prompt_tokens, job.rollout.sampling.max_new_tokens
    batch = StepBatch(
        samples=job.samples_per_step,
        longest=prompt + response,
        learnt=response,
        optimizer_steps=job.algorithm.optimizer_steps,
        epochs=job.algorithm.epochs,
        shard=job.rollout.shard_samples,
        samples_per_prompt=job.data.samples_per_prompt,
    )
    place = job.placement
    policy = read_shape(job.policy.model)
    _check_heads(policy, place.rollout.tensor_parallel, "placement.rollout.tensor_parallel")
    bucket = job.rollout.sync_bucket_mib * MIB
    critic = job.reward_models[0].model if job.critic.init_from == "reward" else job.critic.init_from
    roles: list[ModelRole] = [
        TrainedRole(
            name="policy",
            placement_key="policy",
            key="policy",
            shape=policy.with_head("vocabulary"),
            engine=job.policy.engine,
            lora=job.policy.lora,
            placement=place.policy,
            ranks=place.ranks_of("policy"),
            batch=batch,
            entropy=job.algorithm.entropy_coef > 0,
            scores=True,
            score_passes=2 if job.policy_is_reference else 1,  # once more with its adapters off
            sync_bytes=bucket,
        ),
        TrainedRole(
            name="critic",
            placement_key="critic",
            key="critic",
            shape=read_shape(critic).with_head("scalar"),
            engine=job.critic.engine,
            lora=job.critic.lora,
            placement=place.critic,
            ranks=place.ranks_of("critic"),
            batch=batch,
            scores=True,
            score_passes=1,
        ),
    ]
    if not job.policy_is_reference:
        reference = job.policy.model if job.reference.from_model == "policy" else job.reference.from_model
        ranks = place.ranks_of("reference")
        roles.append(_reference(reference, job.reference.engine, place.reference, ranks, batch))
    for number, part in enumerate(job.reward):
        if isinstance(part, ModelReward):
            shape, ranks = read_shape(part.model).with_head("scalar"), place.ranks_of("reward")
            name = f"reward-{part_name(part)}"
            roles.append(ScoredRole(name, "reward", f"reward.{number}", shape, part.engine, place.reward, ranks, batch))
    adapters = job.policy.lora.rank if job.policy.lora and job.rollout.lora_sync == "adapters" else 0
    roles.append(
        RolloutRole(
            name="rollout",
            placement_key="rollout",
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
    return Workload(
        job,
        tuple(roles),
        phases=("generate", "score", "update", "sync"),
        updated=("critic", "policy"),
        text_workers=workers,
        trajectory_bytes=batch.samples * _trajectory_bytes(prompt, response),
    )


def _reference(
    model: str, engine: ScoringEngine, placement: RolePlacement, ranks: int, batch: StepBatch, passes: int = 1
) -> ScoredRole:
    shape = read_shape(model).with_head("vocabulary")
    return ScoredRole("reference", "reference", "reference", shape, engine, placement, ranks, batch, passes)


def _trajectory_bytes(prompt: int, response: int) -> int:
    """Of one sample: tokens, the engine's log-probs and weight versions; what roles compute of it, by response token
    (log-probs of policy and reference, values, then `TrainingColumns`); and some hundred bytes of names and offsets.
    Trajectories are there twice, in shards and cut anew for the update, while the critic makes these."""
    arrays, columns = 4 * prompt + 3 * 4 * response, (3 + 4) * 4 * response
    return 2 * (arrays + 256) + columns


def _preference(job: PreferenceJob) -> Workload:
    # A row of pairs is a prompt and two answers; how long the prompt is, only the data know.
    longest = job.data.max_tokens * (1 if job.kind == "labels" else 2)
    batch = StepBatch(samples=job.data.rows_per_step, longest=longest, learnt=longest)
    algorithm = job.algorithm
    passes = 1 if algorithm.kto is None else 2  # KTO compares with mismatched answers too
    by_policy = int(algorithm.couples_rows) + passes - 1
    if algorithm.needs_reference and job.policy_is_reference and job.reference.cache is None:
        by_policy += passes
    roles: list[ModelRole] = [
        TrainedRole(
            name="policy",
            placement_key="policy",
            key="policy",
            shape=read_shape(job.policy.model).with_head("vocabulary"),
            engine=job.policy.engine,
            lora=job.policy.lora,
            placement=job.placement.policy,
            ranks=job.role.ranks,
            batch=batch,
            scores=job.policy_is_reference,
            score_passes=by_policy,
        )
    ]
    if algorithm.needs_reference and not job.policy_is_reference and job.reference.cache is None:
        ranks, place = job.placement.reference_ranks, job.placement.reference
        roles.append(_reference(job.reference_model, job.reference.engine, place, ranks, batch, passes))
    return Workload(
        job,
        tuple(roles),
        phases=("score", "update") if "reference" in job.places else ("update",),
        updated=(job.role.name,),
        text_workers=0,
        trajectory_bytes=batch.samples * longest * 4,
    )


def _epochs(job: RewardModelJob | SFTJob) -> Workload:
    role, texts = job.role, 2 if isinstance(job, RewardModelJob) else 1
    longest = job.data.max_tokens * texts
    # A reward model's head is applied at the last token of each text.
    learnt = texts if isinstance(job, RewardModelJob) else longest
    trained = TrainedRole(
        name=role.name,
        placement_key=role.name,
        key=role.name,
        shape=read_shape(role.trained.model).with_head("scalar" if isinstance(job, RewardModelJob) else "vocabulary"),
        engine=role.trained.engine,
        lora=role.trained.lora,
        placement=role.placement,
        ranks=role.ranks,
        batch=StepBatch(samples=role.rows_per_step, longest=longest, learnt=learnt),
    )
    return Workload(
        job,
        (trained,),
        phases=("update",),
        updated=(role.name,),
        text_workers=0,
        trajectory_bytes=role.rows_per_step * longest * 4,
    )


def step_sequences(job: JobConfig, lengths: Lengths) -> Sequences:
    """What a model is fed with in one pass over the samples or rows of a step.

    Args:
        lengths: of prompts and responses; in a job over a data set of the tokens of a row that are not learnt, and of
            those that are, by answer.
    """
    if isinstance(job, PPOJob):
        return Sequences.of(job.samples_per_step, lengths.prompt, lengths.response)
    rows = job.data.rows_per_step
    if isinstance(job, RewardModelJob):
        texts = Sequences.of(rows * _ANSWERS, lengths.prompt + lengths.response, 0)
        return Sequences(rows, texts.tokens, texts.pairs, texts.count)
    if isinstance(job, PreferenceJob) and not job.algorithm.unpaired:
        answers = Sequences.of(rows * _ANSWERS, lengths.prompt, lengths.response)
        # The answers of a row share their prompt's tokens, but each attends to them.
        shared = rows * (_ANSWERS - 1) * lengths.prompt
        return Sequences(rows, answers.tokens - shared, answers.pairs, answers.scored)
    return Sequences.of(rows, lengths.prompt, lengths.response)


def offload_idle(job: JobConfig) -> bool | None:
    """`placement.offload_idle`; None for a job of one role, which has no such key."""
    return getattr(job.placement, "offload_idle", None)


def lengths_of(job: JobConfig, prompt: float | None = None, response: float | None = None) -> Lengths:
    """How long prompts and responses of a job are taken to be.

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
