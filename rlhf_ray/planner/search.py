"""The fastest placements of a job that fit on a cluster.

The job is a candidate as it is. Every layout (`candidates.py`) is one with the fastest settings of its models that fit:
ZeRO stage, offload of the optimizer, activation checkpointing, tokens of a micro-batch. Which of them fit on the
devices of one group of roles does not depend on the other groups, so it is found once for a group and its number of
devices. The fastest candidates are then planned as a whole; the first that fit are the answer.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from rlhf_ray.cluster.assignment import PlacementError
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.rollout import shard_count
from rlhf_ray.planner.calibration import Calibration, Device
from rlhf_ray.planner.candidates import Layout, Setting, layouts, settings
from rlhf_ray.planner.hardware import Hardware
from rlhf_ray.planner.jobs import step_sequences, workload_of
from rlhf_ray.planner.memory import MemoryPlan, plan_memory
from rlhf_ray.planner.overrides import JobVariants, Overrides, arguments
from rlhf_ray.planner.placement import JobDevices, ranks_of
from rlhf_ray.planner.role_memory import engine_plan
from rlhf_ray.planner.step_time import StepTime, step_time
from rlhf_ray.planner.work import Lengths
from rlhf_ray.planner.workload import ModelRole, RolloutRole, ScoredRole, TrainedRole, Workload

logger = logging.getLogger("rlhf_ray")

ConfigValues = dict[str, Any]


@dataclass(frozen=True)
class Proposal:
    """A placement that fits.

    Attributes:
        overrides: keys of the config and their values.
        job: with them.
    """

    overrides: Overrides
    job: Job
    time: StepTime
    plan: MemoryPlan

    @property
    def arguments(self) -> list[str]:
        """As `key=value`, to give on the command line."""
        return arguments(self.overrides)


def best_placements(
    job: Job,
    hardware: Hardware,
    constants: Mapping[Device, Calibration],
    lengths: Lengths,
    most: int = 5,
) -> list[Proposal]:
    """Placements that fit, fastest first; none where nothing that was tried fits.

    Raises:
        ShapeError: when the shape of a model can't be read.
    """
    search = _PlacementSearch(job, hardware, constants, lengths)
    timed = sorted(search.candidates(), key=lambda candidate: candidate[0].seconds)
    logger.debug("%d layouts have settings that fit", len(timed))
    found: list[Proposal] = []
    for time, proposed, overrides in timed:
        if len(found) == most:
            break
        plan = plan_memory(proposed, hardware, constants[hardware.device].memory)
        if plan.fits and proposed not in (other.job for other in found):
            found.append(Proposal(search.changed(overrides), proposed, time, plan))
    return found


class _PlacementSearch:
    def __init__(
        self,
        job: Job,
        hardware: Hardware,
        constants: Mapping[Device, Calibration],
        lengths: Lengths,
    ) -> None:
        self._variants, self._own = JobVariants(job), job
        self._hardware, self._constants, self._lengths = hardware, constants, lengths
        self._roles = workload_of(job).roles
        self._engines = next((role.placed_as for role in self._roles if isinstance(role, RolloutRole)), None)
        self._on_devices = hardware.device == "gpu"
        self._chosen: dict[tuple[object, ...], ConfigValues | None] = {}

    def candidates(self) -> Iterator[tuple[StepTime, Job, Overrides]]:
        """The job as it is and every layout with settings that fit, if it has a place: the step, the job, and what is
        changed in it."""
        uses_devices = any(placement.gpus > 0 for placement in self._own.placements.values())
        as_it_is = [ConfigValues()] if uses_devices == self._on_devices else []
        complete = map(self._complete, layouts(self._own, self._hardware, self._roles[0].shape.heads))
        for overrides in chain(as_it_is, complete):
            placed = None if overrides is None else self._placed(overrides)
            if overrides is None or placed is None:
                continue
            job, devices = placed
            workload = workload_of(job)
            yield step_time(workload, devices, self._lengths, self._cached_tokens(workload)), job, overrides

    def changed(self, overrides: Overrides) -> Overrides:
        """Those that differ from the job's own keys."""
        own = self._variants.job({})
        return {key: value for key, value in overrides.items() if self._variants.job({key: value}) != own}

    def _placed(self, overrides: Overrides) -> tuple[Job, JobDevices] | None:
        """The job with these keys, and what its roles run on; None where the config does not allow it or it has no
        place."""
        job = self._variants.job(overrides)
        try:
            return None if job is None else (job, JobDevices(job, self._hardware, self._constants))
        except PlacementError:
            return None

    def _complete(self, layout: Layout) -> ConfigValues | None:
        """The layout with the settings of all its groups; None where a group has none that fit."""
        overrides: ConfigValues = layout.overrides
        for role in self._roles:
            overrides |= _overrides(role, Setting())
        # Roles without devices share the memory of their node, whatever they do.
        groups = layout.groups if self._on_devices else (tuple(layout.sections),)
        for group, count in zip(groups, layout.devices, strict=False):
            key = (group, count, layout.offload_idle, layout.tensor_parallel if self._engines in group else 0)
            if key not in self._chosen:
                self._chosen[key] = self._choose(overrides, group, count)
            chosen = self._chosen[key]
            if chosen is None:
                return None
            overrides |= chosen
        return overrides

    def _choose(self, overrides: ConfigValues, group: Sequence[str], count: int) -> ConfigValues | None:
        """The fastest settings of a group that fit, the other groups being as they are in `overrides`."""
        placed = self._placed(overrides)
        if placed is None:
            return None
        job, devices = placed
        members = [role for role in self._roles if role.placed_as in group]
        tried = list(
            settings(
                ranks=count,
                scores=any(isinstance(role, ScoredRole) for role in members),
                learns=any(isinstance(role, TrainedRole) for role in members),
                leaves=job.placement.leaves_idle,
                on_devices=self._on_devices,
            )
        )

        def keys(setting: Setting) -> ConfigValues:
            return {key: value for role in members for key, value in _overrides(role, setting).items()}

        def fits(setting: Setting) -> bool:
            proposed = self._variants.job(overrides | keys(setting))
            return proposed is not None and self._fits(proposed, group)

        smallest = next(one for one in tried if all(other.takes_no_less_than(one) for other in tried))
        if not fits(smallest):
            return None
        too_large: list[Setting] = []
        for setting in sorted(tried, key=lambda setting: self._seconds(members, setting, devices)):
            if not any(setting.takes_no_less_than(other) for other in too_large):
                if fits(setting):
                    return keys(setting)
                too_large.append(setting)
        return None

    def _seconds(self, roles: Sequence[ModelRole], setting: Setting, devices: JobDevices) -> float:
        """What the models of a group take for a step, one after the other."""
        sequences, seconds = step_sequences(self._own, self._lengths), 0.0
        for role in roles:
            if isinstance(role, RolloutRole):
                continue
            engine = role.engine.model_copy(update=setting.keys_of(role))
            ranks = replace(ranks_of(role, devices.of[role.placed_as]), engine=engine)
            shards = shard_count(role.step.samples, role.step.shard or role.step.samples)
            seconds += role.score_passes * shards * ranks.scoring_s(sequences / shards)
            if isinstance(role, TrainedRole):
                seconds += role.step.epochs * ranks.update_s(sequences, role.step.optimizer_steps)
        return seconds

    def _fits(self, job: Job, group: Sequence[str]) -> bool:
        """Whether the devices of a group hold all that is on them."""
        plan = plan_memory(job, self._hardware, self._constants[self._hardware.device].memory)
        names = {role.name for role in plan.workload.roles if role.placed_as in group}
        pools = [
            pool
            for pool in plan.pools
            if (pool.device is not None or not self._on_devices) and names & {use.role for use in pool.uses}
        ]
        starts = plan.engine is None or self._engines not in group or plan.engine.starts
        return starts and all(pool.fits for pool in pools)

    def _cached_tokens(self, workload: Workload) -> int | None:
        """That the KV cache of an engine has room for."""
        if workload.rollout is None:
            return None
        memory = min(machine.device_memory for machine in self._hardware.machines)
        return engine_plan(workload.rollout, memory, cpu=not self._on_devices).cached_tokens


def _overrides(role: ModelRole, setting: Setting) -> ConfigValues:
    return {f"{role.section}.engine.{key}": value for key, value in setting.keys_of(role).items()}
