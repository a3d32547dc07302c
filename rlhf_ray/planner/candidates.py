"""What a search for the fastest placement tries: layouts of the roles, and settings of their models.

A layout says which roles share devices, and how many each group of them has:

- *mixed*: models that only score with the trained one of their kind (the reference with the policy, reward models with
  the critic), engines on their own.
- *apart*: every role on its own.
- *trainers together*: all but the engines on the same devices, which they leave to each other or not.
- *all together*: the engines there too, all leaving the devices to each other.

Settings trade memory for time: ZeRO stage, offload of the optimizer, activation checkpointing, micro-batches.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.placement import RolloutPlacement
from rlhf_ray.config.roles import RoleSpec
from rlhf_ray.planner.hardware import Hardware
from rlhf_ray.planner.workload import ModelRole, RolloutRole, TrainedRole

_MOST_CPUS = 8  # of a rank that drives a device; it needs one or two
_KEPT = ("labels", "resources", "env")  # what a role needs wherever it sits

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Layout:
    """One way to place all roles.

    Attributes:
        sections: `placement.ROLE` of each role.
        groups: roles that share devices, each beginning with the one whose they are.
        devices: of each group; ranks, or engines times workers.
        tensor_parallel: of the engines, 1 without any.
        offload_idle: roles of a group leave their devices to each other.
    """

    sections: Mapping[str, Mapping[str, Any]]
    groups: Groups
    devices: tuple[int, ...]
    tensor_parallel: int
    offload_idle: bool

    @property
    def overrides(self) -> dict[str, Any]:
        """Keys of the config that bring it about."""
        found: dict[str, Any] = {f"placement.{role}": dict(section) for role, section in self.sections.items()}
        return found | ({"placement.offload_idle": self.offload_idle} if len(self.sections) > 1 else {})


def layouts(job: Job, hardware: Hardware, heads: int) -> Iterator[Layout]:
    """All that are tried; some may have no place after all.

    Args:
        heads: of the policy's attention, which the workers of an engine share equally.
    """
    devices = sum(machine.devices for machine in hardware.machines)
    if devices:
        yield from _on_devices(job, hardware, heads, devices)
    else:
        yield from _on_cores(job, hardware)


def _on_devices(job: Job, hardware: Hardware, heads: int, devices: int) -> Iterator[Layout]:
    nodes = [machine for machine in hardware.machines if machine.devices]
    each = min(machine.devices for machine in nodes)
    cpus = min(_MOST_CPUS, min(machine.cpus / machine.devices for machine in nodes))
    place = {"gpus": 1, "cpus": int(cpus) if cpus >= 1 else cpus}
    sizes = _sizes(devices, each)
    rows = _placed(job)
    for groups, leave in _groupings(rows):
        hosts = [group[0] for group in groups]
        engines_apart = rows[hosts[-1]].kind == "engine"
        workers = [n for n in sizes if each % n == 0 and heads % n == 0] if _has_engines(rows, groups) else [1]
        models = [rows[host] for host in (hosts[:-1] if engines_apart else hosts)]
        for counts, tensor_parallel in product(_splits(models, sizes, devices), workers):
            if engines_apart:
                counts = (*counts, (devices - sum(counts)) // tensor_parallel * tensor_parallel)
            elif counts[0] % tensor_parallel:
                continue
            if min(counts) > 0:
                yield _layout(job, groups, counts, tensor_parallel, leave, place)


def _on_cores(job: Job, hardware: Hardware) -> Iterator[Layout]:
    """One rank of each role on each node; groups have a part of the cores each, or take turns on all of them."""
    cores = int(min(machine.cpus for machine in hardware.machines))
    rows = _placed(job)
    for groups, leave in _groupings(rows):
        shared = [group for group in groups if len(group) > 1]
        if leave or len(groups) > cores or _has_engines(rows, shared):
            continue
        for nodes, threads in product(_sizes(len(hardware.machines), 1), {max(1, cores // len(groups)), cores}):
            place = {"cpus": cores // len(groups), "threads": threads}
            yield _layout(job, groups, (nodes,) * len(groups), 1, False, place)


def _placed(job: Job) -> dict[str, RoleSpec]:
    """Rows of the role table by the name of their place; those of one place are alike in what is asked here."""
    return {role.placed_as: role for role in job.roles if role.placement is not None}


def _has_engines(rows: Mapping[str, RoleSpec], groups: Iterable[Sequence[str]]) -> bool:
    return any(rows[role].kind == "engine" for group in groups for role in group)


def _groupings(rows: Mapping[str, RoleSpec]) -> Iterator[tuple[Groups, bool]]:
    """Roles that share devices, the engines last, and whether they leave them to each other."""
    models = tuple(role for role, row in rows.items() if row.kind != "engine")
    engines = tuple(role for role, row in rows.items() if row.kind == "engine")
    trained = [role for role in models if rows[role].trained]
    # A model that only scores sits with the trained one of its kind, a reference with a policy for example.
    host_of = {
        role: next((host for host in trained if rows[host].kind == rows[role].kind), trained[0])
        for role in models
        if role not in trained
    }
    mixed = tuple((host, *(role for role in host_of if host_of[role] == host)) for host in trained)
    apart = tuple((role,) for role in models)
    alone = tuple((role,) for role in engines)
    found: list[tuple[Groups, bool]] = [((*groups, *alone), False) for groups in (mixed, apart, (models,))]
    if len(models) > 1:
        found.append(((models, *alone), True))
    if engines:
        found.append((((*models, *engines),), True))
    yield from dict.fromkeys(found)


def _splits(hosts: Sequence[RoleSpec], sizes: list[int], devices: int) -> Iterator[tuple[int, ...]]:
    """Devices of each host. Models that only score on devices of their own get as many as each other."""
    trained = [host.placed_as for host in hosts if host.trained]
    scoring = [host.placed_as for host in hosts if not host.trained]
    for counts in product(sizes, repeat=len(trained)):
        for each in sizes if scoring else [0]:
            found = {**dict(zip(trained, counts, strict=True)), **dict.fromkeys(scoring, each)}
            if sum(found.values()) <= devices and each <= min(counts, default=each):
                yield tuple(found[host.placed_as] for host in hosts)


def _sizes(most: int, each: int) -> list[int]:
    """Numbers of devices that fill nodes evenly: powers of two within a node, then powers of two and thirds between
    them of whole nodes, and all."""
    within = {2**n for n in range(each.bit_length()) if each % 2**n == 0}
    nodes = {k * 2**n for n in range(most.bit_length()) for k in (1, 3)}
    return sorted(n for n in within | {each * n for n in nodes} | {most} if n <= most)


def _layout(
    job: Job, groups: Groups, counts: tuple[int, ...], tensor_parallel: int, leave: bool, place: Mapping[str, Any]
) -> Layout:
    sections: dict[str, dict[str, Any]] = {}
    for group, count in zip(groups, counts, strict=True):
        for role in group:
            own = job.placements[role]
            is_engine = isinstance(own, RolloutPlacement)
            engines = {"engines": count // tensor_parallel, "tensor_parallel": tensor_parallel} if is_engine else {}
            if role == group[0]:
                kept = {key: getattr(own, key) for key in _KEPT if getattr(own, key)}
                sections[role] = {**kept, **(engines or {"ranks": count}), **place}
            else:
                sections[role] = {**({"env": own.env} if own.env else {}), "colocate": group[0], **engines}
    return Layout(sections, groups, counts, tensor_parallel, leave)


@dataclass(frozen=True)
class Setting:
    """The same for all roles of a group.

    Attributes:
        zero_stage: of roles that learn.
        scoring_stage: of roles that only score.
        micro_batch: tokens of a micro-batch ÷ those that the config asks for; never fewer than the longest sample has.
    """

    zero_stage: Literal[1, 2, 3] = 2
    offload_optimizer: bool = False
    activation_checkpointing: bool = False
    scoring_stage: Literal[0, 3] = 0
    micro_batch: float = 1.0

    def keys_of(self, role: ModelRole) -> dict[str, Any]:
        """Of the section `engine` of a role."""
        if isinstance(role, RolloutRole):
            return {}
        stage = self.zero_stage if isinstance(role, TrainedRole) else self.scoring_stage
        parameters = role.engine.offload_parameters if stage == 3 else "none"
        keys = {
            "zero_stage": stage,
            "offload_optimizer": "cpu" if self.offload_optimizer else "none",
            "offload_parameters": parameters,
            "nvme_path": role.engine.nvme_path if parameters == "nvme" else None,
            "activation_checkpointing": self.activation_checkpointing,
            "micro_batch_tokens": max(role.step.longest, int(role.engine.micro_batch_tokens * self.micro_batch)),
        }
        return {key: value for key, value in keys.items() if key in type(role.engine).model_fields}

    def takes_no_less_than(self, other: "Setting") -> bool:
        """Whether it can fit nowhere where `other` does not."""
        return (
            self.zero_stage <= other.zero_stage
            and self.offload_optimizer <= other.offload_optimizer
            and self.activation_checkpointing <= other.activation_checkpointing
            and self.scoring_stage <= other.scoring_stage
            and self.micro_batch >= other.micro_batch
        )


def settings(*, ranks: int, scores: bool, learns: bool, leaves: bool, on_devices: bool) -> Iterator[Setting]:
    """All that make sense.

    Args:
        ranks: of the roles; one has nobody to share with.
        scores, learns: whether such roles are in the group.
        leaves: they leave their devices to each other, which shards of models that only score can't.
        on_devices: with host memory beside them, to which something can be offloaded.
    """
    stages: tuple[Literal[1, 2, 3], ...] = (1, 2, 3) if learns and ranks > 1 else (2,)
    scoring: tuple[Literal[0, 3], ...] = (0, 3) if scores and ranks > 1 and not leaves else (0,)
    offload = (False, True) if learns and on_devices else (False,)
    checkpointing = (False, True) if learns else (False,)
    micro_batches = (4.0, 2.0, 1.0, 0.5, 0.25)
    for stage, off, again, scored, micro in product(stages, offload, checkpointing, scoring, micro_batches):
        yield Setting(stage, off, again, scored, micro)
