"""Roles that sit on the same bundles, and whether they can leave their devices to each other."""

from collections.abc import Mapping

from rlhf_ray.config.job import Job
from rlhf_ray.config.placement import RolePlacement, RolloutPlacement
from rlhf_ray.config.training import ScoringEngine, TrainingEngine


def shared_places(placements: Mapping[str, RolePlacement | RolloutPlacement]) -> list[tuple[str, ...]]:
    """Lists of roles that sit on the same bundles, beginning with the role they were reserved for."""
    lists = [
        (host, *(guest for guest, at in placements.items() if at.colocate == host))
        for host, placement in placements.items()
        if placement.colocate is None
    ]
    return [roles for roles in lists if len(roles) > 1]


def check_sharing(job: Job) -> None:
    """Refuse `placement.offload_idle` where it has no effect or DeepSpeed can't do it."""
    if not job.placement.leaves_idle:
        return
    sharing = {role for roles in shared_places(job.placements) for role in roles}
    if not sharing:
        raise ValueError("placement.offload_idle has no effect: no placement.ROLE.colocate puts two roles together")
    for role in job.roles:
        if role.model_engine is not None and role.placed_as in sharing:
            _check_can_leave(role.section, role.model_engine)


def _check_can_leave(role: str, engine: TrainingEngine | ScoringEngine) -> None:
    if isinstance(engine, ScoringEngine):
        if engine.zero_stage == 3 and engine.offload_parameters == "none":
            raise ValueError(
                f"placement.offload_idle: {role}.engine.zero_stage is 3, whose shards stay where they are: set "
                f"{role}.engine.offload_parameters to cpu, or {role}.engine.zero_stage to 0"
            )
    elif engine.zero_stage == 0:
        raise ValueError(
            f"placement.offload_idle: {role}.engine.zero_stage is 0, whose optimizer state DeepSpeed can't move: set "
            "it to 1, 2 or 3"
        )
    elif engine.offload_parameters != "none" and engine.offload_optimizer == "none":
        raise ValueError(
            f"placement.offload_idle: DeepSpeed moves no optimizer state beside {role}.engine.offload_parameters: "
            f"set {role}.engine.offload_optimizer to cpu"
        )
