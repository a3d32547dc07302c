"""From the role table and the phase table of a job to what the planner adds up."""

from typing import get_args

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.placement import RolloutPlacement
from rlhf_ray.config.roles import ModelSource, RoleSpec, StepShape, needs_by_phase
from rlhf_ray.config.training import ScoringEngine
from rlhf_ray.models.config_json import read_shape
from rlhf_ray.models.shapes import ShapeError, can_share_heads
from rlhf_ray.planner.footprint import StepPhase
from rlhf_ray.planner.work import Lengths, Sequences
from rlhf_ray.planner.workload import ModelRole, RolloutRole, ScoredRole, TrainedRole, Workload


def workload_of(job: Job) -> Workload:
    """What a job asks of its roles.

    Raises:
        ShapeError: when the shape of one of its models can't be read.
    """
    step = job.step_shape
    generates = any(role.kind == "engine" for role in job.roles)
    sample_bytes = _trajectory_bytes(step.prompt, step.response) if generates else 4 * step.longest
    return Workload(
        job,
        tuple(_role(role, role.model, step) for role in job.roles if role.model is not None and _takes_part(role)),
        phases=_phases(job),
        updated=tuple(role.placed_as for role in reversed(job.roles) if role.trained),
        text_workers=sum(role.ranks for role in job.roles if role.kind == "texts"),
        trajectory_bytes=step.samples * sample_bytes,
    )


def _takes_part(role: RoleSpec) -> bool:
    """A reference whose log-probs are kept on disk does not."""
    return role.trained or role.kind == "engine" or role.score_passes > 0


def _phases(job: Job) -> tuple[StepPhase, ...]:
    """Those of the step itself that somebody works in. What a trained role alone does before its update takes less than
    that."""
    needs, trained = needs_by_phase(job.roles), {role.placed_as for role in job.roles if role.trained}
    known: dict[str, StepPhase] = {name: name for name in get_args(StepPhase)}
    return tuple(
        known[phase.name]
        for phase in job.phases
        if phase.name in known and (phase.name == "update" or not needs.get(phase.name, {}).keys() <= trained)
    )


def _role(role: RoleSpec, model: ModelSource, step: StepShape) -> ModelRole:
    shape = read_shape(model.path).with_head("scalar" if role.kind == "scalar" else "vocabulary")
    if isinstance(role.placement, RolloutPlacement):
        workers = role.placement.tensor_parallel
        if not can_share_heads(shape, workers):
            raise ShapeError(
                f"placement.{role.placed_as}.tensor_parallel",
                f"{workers} can't share the {shape.heads} attention heads and {shape.kv_heads} key/value heads of "
                f"{shape.model!r} evenly",
            )
        return RolloutRole(**vars(role), shape=shape, step=step)
    if isinstance(role.engine, ScoringEngine):
        return ScoredRole(**vars(role), shape=shape, step=step)
    return TrainedRole(**vars(role), shape=shape, step=step)


def _trajectory_bytes(prompt: int, response: int) -> int:
    """Of one sample: tokens, the engine's log-probs and weight versions; what roles compute of it, by response token
    (log-probs of policy and reference, values, then `Columns`); and some hundred bytes of names and offsets.
    Trajectories are there twice, in generated shards and in those that are trained on, while these are made."""
    arrays, columns = 4 * prompt + 3 * 4 * response, (3 + 4) * 4 * response
    return 2 * (arrays + 256) + columns


def step_sequences(job: Job, lengths: Lengths) -> Sequences:
    """What a model is fed with in one pass over the samples or rows of a step.

    Args:
        lengths: of prompts and responses; in a job over a data set of the tokens of a row that are not learnt, and of
            those that are, by text.
    """
    step = job.step_shape
    rows, texts = step.samples, step.texts
    if step.last_only:
        whole = Sequences.of(rows * texts, lengths.prompt + lengths.response, 0)
        return Sequences(rows, whole.tokens, whole.pairs, whole.count)
    answers = Sequences.of(rows * texts, lengths.prompt, lengths.response)
    if texts == 1:
        return answers
    # The answers of a row share their prompt's tokens, but each attends to them.
    return Sequences(rows, answers.tokens - rows * (texts - 1) * lengths.prompt, answers.pairs, answers.scored)


def lengths_of(job: Job, prompt: float | None = None, response: float | None = None) -> Lengths:
    """How long prompts and responses of a job are taken to be.

    Args:
        prompt, response: mean tokens of prompts and responses, in a job over a data set of what is not learnt of a row
            and of what is (of a pair's answers each). By default the longest that the config allows; of a pair, the
            prompt then has half of them.
    """
    most, longest = job.step_shape.prompt, job.step_shape.response
    return Lengths(most if prompt is None else prompt, longest if response is None else response, longest)
