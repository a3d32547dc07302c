"""On which nodes and devices the processes of a job run, how fast they are there, and what they share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf_ray.cluster.assignment import Assignment, assign, requests_of
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.placement import RolePlacement, RolloutPlacement
from rlhf_ray.planner.calibration import Calibration, Device
from rlhf_ray.planner.devices import DEVICES
from rlhf_ray.planner.hardware import Hardware, Machine
from rlhf_ray.planner.pass_time import ProcessGroup, Ranks, Rates, rates_of
from rlhf_ray.planner.workload import ModelRole, RolloutRole, ScoredRole, TrainedRole, Workload


@dataclass(frozen=True)
class RoleDevices:
    """What the processes of one role run on.

    Attributes:
        rates: of its slowest rank or worker.
        group: its ranks, or the workers of one engine.
        constants: of the device.
        nodes: names of its nodes.
        needs: of each device or node that it may share with others, how much it uses.
    """

    rates: Rates
    group: ProcessGroup
    constants: Calibration
    nodes: frozenset[str]
    needs: Mapping[str, float]


class JobDevices:
    """What all roles of a job run on, placed as a run would place them.

    Args:
        constants: of each kind of device in use.

    Attributes:
        of: by role.
        capacity: of each resource that roles need: 1 of devices, so that roles on them take turns; cores of nodes.

    Raises:
        PlacementError: when a role has no place.
    """

    def __init__(self, job: Job, hardware: Hardware, constants: Mapping[Device, Calibration]) -> None:
        self._placements, self._hardware, self._constants = job.placements, hardware, constants
        self._assignment = assign(requests_of(self._placements), hardware.nodes)
        self.capacity: dict[str, float] = {}
        self.of = {role: self._role_devices(role) for role in self._placements}

    def _role_devices(self, role: str) -> RoleDevices:
        placement = self._placements[role]
        host = placement.colocate or role
        at = self._placements[host]
        nodes = self._assignment[host]
        machines = [self._hardware.machine(node) for node in nodes]
        if not at.gpus:
            machines = [_without_devices(machine) for machine in machines]
        threads = placement.threads or at.threads or max(1, int(at.cpus))
        constants = self._constants["gpu" if at.gpus else "cpu"]
        rates = min((rates_of(machine, constants, threads) for machine in machines), key=lambda rates: rates.bfloat16)
        group = ProcessGroup(len(nodes), len({node.name for node in nodes}), rates.link, rates.network)
        processes = 1
        if isinstance(placement, RolloutPlacement):
            group = replace(group, ranks=placement.tensor_parallel, nodes=1)
            processes = placement.tensor_parallel if host == role else 1
        needs = self._on_devices(host) if at.gpus else self._on_cores(machines, threads * processes)
        return RoleDevices(rates, group, constants, frozenset(node.name for node in nodes), needs)

    def _on_devices(self, host: str) -> dict[str, float]:
        name = f"devices of {host}"
        self.capacity[name] = 1.0
        return {name: 1.0}

    def _on_cores(self, machines: list[Machine], threads: int) -> dict[str, float]:
        needs: dict[str, float] = {}
        for machine in machines:
            name = f"cores of {machine.node.name}"
            needs[name] = needs.get(name, 0.0) + threads
            self.capacity[name] = max(1.0, machine.cpus)
        return needs


def ranks_of(role: TrainedRole | ScoredRole, devices: RoleDevices) -> Ranks:
    """The model of a role on its ranks."""
    lora = role.lora if isinstance(role, TrainedRole) else None
    return Ranks(role.shape, role.engine, devices.rates, devices.group, devices.constants, lora)


def _without_devices(machine: Machine) -> Machine:
    """The same node for a role that reserves no device of it."""
    return machine if machine.kind.is_cpu else replace(machine, kind=DEVICES["CPU"], devices=0)


@dataclass(frozen=True)
class RoleProcess:
    """One process of a role, on its node and device.

    Attributes:
        rank: of the role; of an engine's worker its number among the workers of all engines.
        device: number of its device within the node; None on the CPU.
        first: of its engine's workers.
    """

    role: ModelRole
    rank: int
    machine: Machine
    device: int | None
    first: bool = True


def assign_processes(workload: Workload, hardware: Hardware) -> list[RoleProcess]:
    """All processes that hold a model.

    Raises:
        PlacementError: when a role can not be placed.
    """
    placements = workload.job.placements
    assignment = assign(requests_of(placements), hardware.nodes)
    devices = _devices(placements, assignment)
    processes = []
    for role in workload.roles:
        own = placements[role.placed_as]
        host = own.colocate or role.placed_as
        # A bundle of an engine of its own holds all its workers; a bundle of a role holds one process of each guest.
        slots = [
            (hardware.machine(node), device)
            for node, numbers in zip(assignment[host], devices[host], strict=True)
            for device in numbers
        ]
        workers = role.placement.tensor_parallel if isinstance(role, RolloutRole) else 1
        processes += [
            RoleProcess(role, rank, machine, device, rank % workers == 0)
            for rank, (machine, device) in enumerate(slots)
        ]
    return processes


def _devices(
    placements: dict[str, RolePlacement | RolloutPlacement], assignment: Assignment
) -> dict[str, list[Sequence[int | None]]]:
    """Numbers of the devices of each bundle of each role, one for each process; None for a process on the CPU."""
    taken: dict[str, list[float]] = {}
    found: dict[str, list[Sequence[int | None]]] = {}
    for role, place in placements.items():
        if role not in assignment:
            continue
        workers = place.tensor_parallel if isinstance(place, RolloutPlacement) else 1
        found[role] = []
        for node in assignment[role]:
            there = taken.setdefault(node.name, [])
            numbers = [_next_device(there, place.gpus) if place.gpus else None for _ in range(workers)]
            found[role].append(numbers)
    return found


def _next_device(taken: list[float], share: float) -> int:
    """The first device with so much of it left; `taken` has the shares of each so far."""
    for number, used in enumerate(taken):
        if used + share <= 1.0001:
            taken[number] += share
            return number
    taken.append(share)
    return len(taken) - 1
