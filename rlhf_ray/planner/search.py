"""The fastest placements of a job that fit on a cluster.

The job is a candidate as it is. Every layout (`candidates.py`) is one with the fastest settings of its models that fit:
ZeRO stage, offload of the optimizer, activation checkpointing, tokens of a micro-batch. Which of them fit on the
devices of one group of roles does not depend on the other groups, so it is found once for a group and its number of
devices. The fastest candidates are then planned as a whole; the first that fit are the answer.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import yaml

from rlhf_ray.cluster.assignment import PlacementError, assign, requests_of
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import ConfigError, parse_config
from rlhf_ray.planner.calibration import Calibration, Device, ProcessMemory
from rlhf_ray.planner.candidates import Layout, Setting, layouts, settings
from rlhf_ray.planner.hardware import Hardware
from rlhf_ray.planner.jobs import workload_of
from rlhf_ray.planner.memory import MemoryPlan, plan_memory
from rlhf_ray.planner.placement import AssignedHardware, JobDevices, ranks_of
from rlhf_ray.planner.role_memory import engine_plan
from rlhf_ray.planner.step_time import StepTime, step_time
from rlhf_ray.planner.work import Lengths, Sequences
from rlhf_ray.planner.workload import ModelRole, RolloutRole, ScoredRole, TrainedRole

logger = logging.getLogger("rlhf_ray")

ConfigValues = dict[str, Any]


@dataclass(frozen=True)
class Proposal:
    """A placement that fits.

    Attributes:
        overrides: keys of the config and their values.
        job: with them.
    """

    overrides: Mapping[str, Any]
    job: Job
    time: StepTime
    plan: MemoryPlan

    @property
    def arguments(self) -> list[str]:
        """As `key=value`, to give on the command line."""
        return [f"{key}={_written(value)}" for key, value in self.overrides.items()]


def best_placements(
    job: Job,
    hardware: Hardware,
    constants: Mapping[Device, Calibration],
    processes: ProcessMemory,
    lengths: Lengths,
    most: int = 5,
) -> list[Proposal]:
    """Placements that fit, fastest first; none where nothing that was tried fits.

    Raises:
        ShapeError: when the shape of a model can't be read.
    """
    search = _PlacementSearch(job, hardware, constants, processes, lengths)
    timed = sorted(search.candidates(), key=lambda candidate: candidate[0].seconds)
    logger.debug("%d layouts have settings that fit", len(timed))
    found: list[Proposal] = []
    for time, overrides in timed:
        if len(found) == most:
            break
        proposed = search.job(overrides)
        assert proposed is not None
        plan = plan_memory(proposed, hardware, processes)
        if plan.fits and proposed not in (other.job for other in found):
            found.append(Proposal(search.changed(overrides), proposed, time, plan))
    return found


class _PlacementSearch:
    def __init__(
        self,
        job: Job,
        hardware: Hardware,
        constants: Mapping[Device, Calibration],
        processes: ProcessMemory,
        lengths: Lengths,
    ) -> None:
        self._raw = job.model_dump(mode="json", by_alias=True)
        self._job, self._hardware, self._constants = job, hardware, constants
        self._processes, self._lengths = processes, lengths
        self._roles = workload_of(job).roles
        self._on_devices = hardware.device == "gpu"
        self._chosen: dict[tuple[object, ...], ConfigValues | None] = {}

    def candidates(self) -> Iterator[tuple[StepTime, ConfigValues]]:
        """The job as it is and every layout with settings that fit, if it has a place: the step, and what to change."""
        uses_devices = any(placement.gpus > 0 for placement in self._job.placements.values())
        as_it_is = [ConfigValues()] if uses_devices == self._on_devices else []
        complete = map(self._complete, layouts(self._job, self._hardware, self._roles[0].shape.heads))
        for overrides in chain(as_it_is, complete):
            job = None if overrides is None else self.job(overrides)
            cluster = None if job is None else self._cluster(job)
            if overrides is None or job is None or cluster is None:
                continue
            workload = workload_of(job)
            yield step_time(workload, cluster, self._lengths, self._cached_tokens(job)), overrides

    def job(self, overrides: ConfigValues) -> Job | None:
        """With these keys; None where the config does not allow them."""
        raw = _copy(self._raw)
        for key, value in overrides.items():
            _set(raw, key, value)
        try:
            return parse_config(raw)
        except ConfigError:
            return None

    def changed(self, overrides: ConfigValues) -> ConfigValues:
        """Those that differ from the job's own keys."""
        own = self.job({})
        assert own is not None
        return {key: value for key, value in overrides.items() if self.job({key: value}) != own}

    def _cluster(self, job: Job) -> AssignedHardware | None:
        requests = requests_of(job.placements)
        try:
            return AssignedHardware(self._hardware, assign(requests, self._hardware.nodes), self._constants)
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
            key = (group, count, layout.offload_idle, layout.tensor_parallel if "rollout" in group else 0)
            if key not in self._chosen:
                self._chosen[key] = self._choose(overrides, group, count)
            chosen = self._chosen[key]
            if chosen is None:
                return None
            overrides |= chosen
        return overrides

    def _choose(self, overrides: ConfigValues, group: Sequence[str], count: int) -> ConfigValues | None:
        """The fastest settings of a group that fit, the other groups being as they are in `overrides`."""
        job = self.job(overrides)
        cluster = None if job is None else self._cluster(job)
        if job is None or cluster is None:
            return None
        members = [role for role in self._roles if role.placement_key in group]
        devices = JobDevices(job, cluster)
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
            proposed = self.job(overrides | keys(setting))
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
        seconds = 0.0
        for role in roles:
            if isinstance(role, RolloutRole):
                continue
            batch = Sequences.of(role.batch.samples, self._lengths.prompt, self._lengths.response)
            ranks = ranks_of(setting.applied(role), devices.of[role.placement_key])
            shard = role.batch.shard or role.batch.samples
            seconds += ranks.scoring_s(batch / (role.batch.samples / shard)) * role.batch.samples / shard
            if isinstance(role, TrainedRole):
                seconds += role.batch.epochs * ranks.update_s(batch, role.batch.optimizer_steps)
        return seconds

    def _fits(self, job: Job, group: Sequence[str]) -> bool:
        """Whether the devices of a group hold all that is on them."""
        plan = plan_memory(job, self._hardware, self._processes)
        names = {role.name for role in plan.workload.roles if role.placement_key in group}
        pools = [
            pool
            for pool in plan.pools
            if (pool.device is not None or not self._on_devices) and names & {use.role for use in pool.uses}
        ]
        starts = plan.engine is None or "rollout" not in group or plan.engine.starts
        return starts and all(pool.fits for pool in pools)

    def _cached_tokens(self, job: Job) -> int | None:
        """That the KV cache of an engine has room for."""
        role = workload_of(job).rollout
        if role is None:
            return None
        memory = min(machine.device_memory for machine in self._hardware.machines)
        return engine_plan(role, memory, cpu=not self._on_devices).cached_tokens


def _overrides(role: ModelRole, setting: Setting) -> ConfigValues:
    return {f"{role.key}.engine.{key}": value for key, value in setting.keys_of(role).items()}


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def _set(raw: Any, path: str, value: Any) -> None:
    """As `apply_override`, without a way through YAML: a search does it a hundred thousand times."""
    *sections, last = path.split(".")
    for key in sections:
        raw = raw[int(key)] if isinstance(raw, list) else raw[key]
    raw[last] = value


def _written(value: Any) -> str:
    """In YAML on one line, as an override is read."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("\n...\n").strip()
