"""What a config says, in short lines for people."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.placement import RolloutPlacement
from rlhf_ray.config.roles import RoleSpec
from rlhf_ray.config.training import Lora, ScoringEngine, TrainingEngine
from rlhf_ray.telemetry.metrics import Metrics

if TYPE_CHECKING:  # the command line, which shows lines, is to import no tokenizers
    from rlhf_ray.controllers.inputs import RowSet
    from rlhf_ray.data.prompts import PromptSet

Line = tuple[str, str]
"""A name, and what there is to say of it."""


def role_lines(config: Job) -> Iterator[Line]:
    """What each role holds, how, and where it sits."""
    for role in config.roles:
        yield role.name, role_text(role)


def role_text(role: RoleSpec) -> str:
    """`models/tiny · bfloat16, ZeRO stage 2 · 2 ranks with 1 CPU each`."""
    placement, engine = role.placement, role.model_engine
    if isinstance(placement, RolloutPlacement):
        dtype = "" if role.engine is None else f"{role.engine.dtype_choice} · "
        if placement.colocate is not None:
            return f"{dtype}{several(placement.engines, 'engine')} beside {placement.colocate}"
        workers = placement.tensor_parallel
        return dtype + _held(placement.engines, "engine", placement.cpus * workers, placement.gpus * workers)
    if placement is None or engine is None or role.model is None:
        return several(role.ranks, "worker")
    sits = (
        f"{several(role.ranks, 'rank')} beside {placement.colocate}"
        if placement.colocate is not None
        else _held(role.ranks, "rank", placement.cpus, placement.gpus)
    )
    return f"{role.model.path} · {engine_text(engine, role.lora)} · {sits}"


def engine_text(engine: TrainingEngine | ScoringEngine, lora: Lora | None) -> str:
    """`LoRA of rank 16 · bfloat16, ZeRO stage 2`."""
    zero = f", ZeRO stage {engine.zero_stage}" if engine.zero_stage else ""
    sp_size = engine.sequence_parallel
    held = f"{engine.dtype_choice}{zero}" + (f", sequences over {sp_size} ranks" if sp_size > 1 else "")
    if lora is None:
        return held
    return f"LoRA of rank {lora.rank}{'' if lora.base == 'as_model' else f' on {lora.base}'} · {held}"


def several(count: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _held(count: int, what: str, cpus: float, gpus: float) -> str:
    """`2 ranks with 1 CPU and 1 GPU each`."""
    resources = f"{cpus:g} CPU and {gpus:g} GPU" if gpus else f"{cpus:g} CPU"
    return f"{several(count, what)} with {resources}{'' if count == 1 else ' each'}"


def counts(rows: "RowSet | PromptSet") -> str:
    """`800 kept, 0 dropped, 3 truncated`."""
    return f"{len(rows):,} kept, {rows.dropped:,} dropped, {rows.truncated:,} truncated"


def held_out_line(rows: Sequence[Metrics], what: str) -> Line:
    """The first and the last evaluation of a run, by the measure that says most."""
    name, metric = f"held-out {what}", f"eval/{what}"
    held_out = [row for row in rows if metric in row]
    if not held_out:
        return name, "not measured: data.eval is not set"
    first, last = held_out[0], held_out[-1]
    earlier = "" if first is last else f" ({first[metric]:.3f} after step {first['step']:.0f})"
    return name, f"{last[metric]:.3f} after step {last['step']:.0f}{earlier}"
