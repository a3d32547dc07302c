"""What a search for the fastest placement tries: layouts of the roles, and settings of their models.

A layout says which roles share devices, and how many each group of them has:

- *mixed*: the reference with the policy, reward models with the critic, engines on their own.
- *apart*: every role on its own.
- *trainers together*: all but the engines on the same devices, which they leave to each other or not.
- *all together*: the engines there too, all leaving the devices to each other.

Settings trade memory for time: ZeRO stage, offload of the optimizer, activation checkpointing, micro-batches.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.placement import RolloutPlacement
from rlhf_ray.planner.hardware import Hardware
from rlhf_ray.planner.workload import ModelRole, RolloutRole, ScoredRole, TrainedRole

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
    for groups, leave in _groupings(job):
        hosts = [group[0] for group in groups]
        engines_apart = hosts[-1] == "rollout"
        with_engines = any("rollout" in group for group in groups)
        workers = [n for n in sizes if each % n == 0 and heads % n == 0] if with_engines else [1]
        trained = hosts[:-1] if engines_apart else hosts
        for counts, tensor_parallel in product(_splits(trained, sizes, devices), workers):
            rest = devices - sum(counts)
            if engines_apart:
                counts = (*counts, rest // tensor_parallel * tensor_parallel)
            elif with_engines and counts[0] % tensor_parallel:
                continue
            if min(counts) > 0:
                yield _layout(job, groups, counts, tensor_parallel, leave, [place] * len(groups))


def _on_cores(job: Job, hardware: Hardware) -> Iterator[Layout]:
    """One rank of each role on each node; groups have a part of the cores each, or take turns on all of them."""
    cores = int(min(machine.cpus for machine in hardware.machines))
    for groups, leave in _groupings(job):
        if leave or len(groups) > cores or any(len(group) > 1 and "rollout" in group for group in groups):
            continue
        for nodes, threads in product(_sizes(len(hardware.machines), 1), {max(1, cores // len(groups)), cores}):
            place = {"cpus": cores // len(groups), "threads": threads}
            yield _layout(job, groups, (nodes,) * len(groups), 1, False, [place] * len(groups))


def _groupings(job: Job) -> Iterator[tuple[Groups, bool]]:
    """Roles that share devices, the engines last, and whether they leave them to each other."""
    roles = list(job.placements)
    pairs = {"policy": ("policy", "reference"), "critic": ("critic", "reward")}
    mixed = tuple(
        tuple(guest for guest in pairs.get(role, (role,)) if guest in roles)
        for role in roles
        if role in pairs or role == "rollout" or len(roles) == 1
    )
    apart = tuple((role,) for role in roles)
    together: Groups = (tuple(role for role in roles if role != "rollout"),)
    if "rollout" in roles:
        together = (*together, ("rollout",))
    found: list[tuple[Groups, bool]] = [(mixed, False), (apart, False), (together, False)]
    if len(together[0]) > 1:
        found.append((together, True))
    if "rollout" in roles:
        found.append(((tuple(roles),), True))
    yield from dict.fromkeys(found)


def _splits(hosts: list[str], sizes: list[int], devices: int) -> Iterator[tuple[int, ...]]:
    """Devices of each host. Reference and reward models of their own get as many as each other."""
    scoring = [host for host in hosts if host in ("reference", "reward")]
    others = [host for host in hosts if host not in scoring]
    for counts in product(sizes, repeat=len(others)):
        for each in sizes if scoring else [0]:
            found = {**dict(zip(others, counts, strict=True)), **dict.fromkeys(scoring, each)}
            if sum(found.values()) <= devices and each <= min(counts, default=each):
                yield tuple(found[host] for host in hosts)


def _sizes(most: int, each: int) -> list[int]:
    """Numbers of devices that fill nodes evenly: powers of two within a node, then powers of two and thirds between
    them of whole nodes, and all."""
    within = {2**n for n in range(each.bit_length()) if each % 2**n == 0}
    nodes = {k * 2**n for n in range(most.bit_length()) for k in (1, 3)}
    return sorted(n for n in within | {each * n for n in nodes} | {most} if n <= most)


def _layout(
    job: Job,
    groups: Groups,
    counts: tuple[int, ...],
    tensor_parallel: int,
    leave: bool,
    places: list[dict[str, Any]],
) -> Layout:
    sections: dict[str, dict[str, Any]] = {}
    for group, count, place in zip(groups, counts, places, strict=True):
        for role in group:
            own = job.placements[role]
            section: dict[str, Any] = {key: getattr(own, key) for key in _KEPT if getattr(own, key)}
            engines = {"engines": count // tensor_parallel, "tensor_parallel": tensor_parallel}
            amount = engines if isinstance(own, RolloutPlacement) else {"ranks": count}
            if role == group[0]:
                section |= amount | place
            else:
                guest = {"env": own.env} if own.env else {}
                section = guest | {"colocate": group[0]} | (engines if isinstance(own, RolloutPlacement) else {})
            sections[role] = section
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
        tokens = max(role.batch.longest, int(role.engine.micro_batch_tokens * self.micro_batch))
        if isinstance(role, ScoredRole):
            parameters = role.engine.offload_parameters if self.scoring_stage == 3 else "none"
            return {
                "zero_stage": self.scoring_stage,
                "offload_parameters": parameters,
                "nvme_path": role.engine.nvme_path if parameters == "nvme" else None,
                "micro_batch_tokens": tokens,
            }
        parameters = role.engine.offload_parameters if self.zero_stage == 3 else "none"
        return {
            "zero_stage": self.zero_stage,
            "offload_optimizer": "cpu" if self.offload_optimizer else "none",
            "offload_parameters": parameters,
            "nvme_path": role.engine.nvme_path if parameters == "nvme" else None,
            "activation_checkpointing": self.activation_checkpointing,
            "micro_batch_tokens": tokens,
        }

    def applied(self, role: TrainedRole | ScoredRole) -> TrainedRole | ScoredRole:
        """The role, held so."""
        if isinstance(role, TrainedRole):
            return replace(role, engine=role.engine.model_copy(update=self.keys_of(role)))
        return replace(role, engine=role.engine.model_copy(update=self.keys_of(role)))

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
