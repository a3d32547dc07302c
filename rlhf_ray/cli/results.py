"""What commands print when all went well."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.text import Text

from rlhf_ray.config.jobs import EpochJob, JobConfig, PPOJob, PreferenceJob, RewardModel, RewardModelJob, SFTJob
from rlhf_ray.config.number_formats import NumberFormats
from rlhf_ray.config.placement import RolePlacement
from rlhf_ray.config.reward_loss import BradleyTerry
from rlhf_ray.config.rewards import FunctionReward, HttpReward, ModelReward, part_name
from rlhf_ray.config.training import Critic, Policy, ScoringEngine, TrainingEngine
from rlhf_ray.recovery.checkpoints import CheckpointStore
from rlhf_ray.telemetry.metrics import Metrics, read_metrics
from rlhf_ray.telemetry.progress import QuietConsole
from rlhf_ray.telemetry.summary import reward_summary

if TYPE_CHECKING:
    from rlhf_ray.controllers.inputs import EpochInputs, PPOInputs, RowSet
    from rlhf_ray.data.prompts import PromptSet

Line = tuple[str, str]
Role = Literal["policy", "critic", "reference", "reward"]


def show(rows: Iterable[tuple[str, ...]]) -> None:
    """Columns on stdout, the first in bold. A row is never broken, so that paths can be copied."""
    table = list(rows)
    if not table:
        return
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    console = QuietConsole()
    for row in table:
        first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        text = Text.assemble((first, "bold"), *(f"  {cell}" for cell in others))
        text.rstrip()
        console.print(text, soft_wrap=True)


def note(line: str) -> None:
    """A line on stdout."""
    QuietConsole().print(Text(line), soft_wrap=True)


def config_lines(config: JobConfig, inputs: "PPOInputs | EpochInputs | None") -> Iterator[Line]:
    """A config in short.

    Args:
        inputs: what the check of models and data found; None when it was not asked for.
    """
    yield "job", f"{config.job} {config.name!r}, seed {config.seed}"
    if isinstance(config, PPOJob):
        yield from _ppo_lines(config)
        if inputs is not None:
            yield "prompts", _counts(inputs.prompts)  # type: ignore[union-attr]
    else:
        yield from _epoch_lines(config, inputs)  # type: ignore[arg-type]
    yield "run", f"{config.run.dir}{_standing(config)}"


def number_format_lines(formats: NumberFormats) -> Iterator[Line]:
    """What `dtype: auto` became and why, and what was written out and is slow."""
    yield from (("dtype auto", line) for line in formats.lines)
    if formats.open:
        yield "dtype auto", f"for {', '.join(formats.open)}: chosen at the start, by the CPUs that they come to"
    yield from (("warning", warning) for warning in formats.warnings)


def _ppo_lines(config: PPOJob) -> Iterator[Line]:
    data = config.data
    per_step = f"{config.samples_per_step} samples a step ({data.prompts_per_step} prompts × {data.samples_per_prompt})"
    yield "steps", f"{config.run.steps}, {per_step}"
    place = config.placement
    critic = config.reward_models[0].model if config.critic.init_from == "reward" else config.critic.init_from
    reference = config.policy.model if config.reference.from_model == "policy" else config.reference.from_model
    yield "policy", f"{config.policy.model} · {_trained(config.policy)} · {_ranks(config, 'policy')}"
    yield "critic", f"from {critic} · {_trained(config.critic)} · {_ranks(config, 'critic')}"
    if config.policy_is_reference:
        yield "reference", "the policy with its adapters off"
    else:
        yield "reference", f"{reference} · {_engine(config.reference.engine)} · {_ranks(config, 'reference')}"
    for part in config.reward:
        yield f"reward/{part_name(part)}", f"{_part(config, part)} · weight {part.weight:g}"
    rollout = place.rollout
    dtype = config.rollout.engine.dtype_choice
    workers = rollout.tensor_parallel
    if rollout.colocate is not None:
        yield "rollout", f"{dtype} · {_several(rollout.engines, 'engine')} beside {rollout.colocate}"
    else:
        held = _held(rollout.engines, "engine", rollout.cpus * workers, rollout.gpus * workers)
        yield "rollout", f"{dtype} · {held}"


def _epoch_lines(config: EpochJob, inputs: "EpochInputs | None") -> Iterator[Line]:
    role = config.role
    rows = "pairs" if isinstance(config, RewardModelJob) and isinstance(config.loss, BradleyTerry) else "rows"
    streaming = isinstance(config, SFTJob) and config.data.streaming
    epochs = _several(config.run.epochs, "epoch")
    steps = epochs if inputs is None else f"{inputs.steps} ({epochs})"
    if isinstance(config, SFTJob) and config.run.steps is not None:
        steps = str(config.run.steps)
    yield "steps", f"{steps}, {role.rows_per_step} {rows} a step"
    held = _held(role.ranks, "rank", role.placement.cpus, role.placement.gpus)
    yield role.name, f"{role.trained.model} · {_trained(role.trained)} · {held}"
    if isinstance(config, PreferenceJob):
        yield from _preference_lines(config)
    if inputs is not None:
        yield rows, "read while training" if streaming else _counts(inputs.train)  # type: ignore[arg-type]
        if inputs.held_out is not None:
            yield f"held-out {rows}", _counts(inputs.held_out)


def _preference_lines(config: PreferenceJob) -> Iterator[Line]:
    losses = (loss.type if loss.weight == 1 else f"{loss.weight:g} {loss.type}" for loss in config.algorithm.loss)
    yield "loss", " + ".join(losses)
    if not config.algorithm.needs_reference:
        return
    if config.policy_is_reference:
        yield "reference", "the policy with its adapters off"
        return
    place, ranks = config.placement.reference, config.placement.reference_ranks
    own = _held(ranks, "rank", place.cpus, place.gpus)
    held = f"{_several(ranks, 'rank')} beside policy" if place.colocate else own
    cache = "" if config.reference.cache is None else f" · log-probs kept in {config.reference.cache}"
    yield "reference", f"{config.reference_model} · {_engine(config.reference.engine)} · {held}{cache}"


def _trained(section: Policy | Critic | RewardModel) -> str:
    lora, engine = section.lora, _engine(section.engine)
    if lora is None:
        return engine
    return f"LoRA of rank {lora.rank}{'' if lora.base == 'as_model' else f' on {lora.base}'} · {engine}"


def _engine(engine: TrainingEngine | ScoringEngine) -> str:
    zero = f", ZeRO stage {engine.zero_stage}" if engine.zero_stage else ""
    together = engine.sequence_parallel
    return f"{engine.dtype_choice}{zero}" + (f", sequences over {together} ranks" if together > 1 else "")


def _ranks(config: PPOJob, role: Role) -> str:
    place: RolePlacement = getattr(config.placement, role)
    ranks = config.placement.ranks_of(role)
    if place.colocate is not None:
        return f"{_several(ranks, 'rank')} beside {place.colocate}"
    return _held(ranks, "rank", place.cpus, place.gpus)


def _part(config: PPOJob, part: ModelReward | FunctionReward | HttpReward) -> str:
    if isinstance(part, ModelReward):
        return f"{part.model} · {_engine(part.engine)} · {_ranks(config, 'reward')}"
    if isinstance(part, FunctionReward):
        return f"{part.function} · {_several(part.workers, 'worker')}"
    return part.url


def _held(count: int, what: str, cpus: float, gpus: float) -> str:
    """`2 ranks with 1 CPU and 1 GPU each`."""
    resources = f"{cpus:g} CPU and {gpus:g} GPU" if gpus else f"{cpus:g} CPU"
    return f"{_several(count, what)} with {resources}{'' if count == 1 else ' each'}"


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _counts(found: "PromptSet | RowSet") -> str:
    return f"{len(found):,} kept, {found.dropped:,} dropped, {found.truncated:,} truncated"


def _standing(config: JobConfig) -> str:
    steps = checkpointed_steps(config)
    if not steps:
        return ""
    then = "train refuses it, since run.resume is 'never'" if config.run.resume == "never" else "train goes on from it"
    return f", which has a checkpoint of step {steps[-1]}: {then}"


def checkpointed_steps(config: JobConfig) -> list[int]:
    """Steps that the run folder has complete checkpoints of, ascending."""
    return CheckpointStore(Path(config.run.dir), config.run.keep_last, config.run.keep_best).steps()


def run_lines(config: JobConfig, folder: Path) -> Iterator[Line]:
    """How a finished run went, and where its results are."""
    rows = read_metrics(folder)
    if isinstance(config, PPOJob):
        yield from _reward_lines(config, rows)
    else:
        yield _held_out_line(rows, _headline(config))
    files = {
        "metrics": "metrics.jsonl",
        "curves": "curves.png",
        "report": "reward_report.md",
        "reliability": "reliability.png",
        "samples": "samples.jsonl",
        "before and after": "before_after.md",
        "trace": "timeline.json",
        "TensorBoard": "tensorboard",
        "model": "export",
        "adapter": "export/adapter",
    }
    yield from ((what, str(folder / file)) for what, file in files.items() if _has_content(folder / file))
    if steps := checkpointed_steps(config):
        named = ", ".join(map(str, steps))
        yield "checkpoints", f"{folder / 'checkpoints'} ({'step' if len(steps) == 1 else 'steps'} {named})"


def _has_content(path: Path) -> bool:
    return path.is_dir() or (path.is_file() and path.stat().st_size > 0)


def _reward_lines(config: PPOJob, rows: Sequence[Metrics]) -> Iterator[Line]:
    yield "reward", str(reward_summary(rows))
    if len(config.reward) > 1:
        for part in config.reward:
            name = f"reward/{part_name(part)}"
            found = reward_summary(rows, name)
            note = " (never trained on)" if part.weight == 0 else ""
            yield name, f"{found.first:.3f} → {found.last:.3f} ({found.last - found.first:+.3f}){note}"


def _headline(config: EpochJob) -> str:
    """The metric of an evaluation that says most."""
    if isinstance(config, SFTJob):
        return "perplexity"
    return "loss" if isinstance(config, PreferenceJob) and config.algorithm.unpaired else "accuracy"


def _held_out_line(rows: Sequence[Metrics], what: str) -> Line:
    name, metric = f"held-out {what}", f"eval/{what}"
    held_out = [row for row in rows if metric in row]
    if not held_out:
        return name, "not measured: data.eval is not set"
    first, last = held_out[0], held_out[-1]
    earlier = "" if first is last else f" ({first[metric]:.3f} after step {first['step']:.0f})"
    return name, f"{last[metric]:.3f} after step {last['step']:.0f}{earlier}"
