"""Each process of a job on its node and device, as the run would place it."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.cluster.assignment import Assignment, assign, requests_of
from rlhf_ray.config.placement import RolePlacement, RolloutPlacement
from rlhf_ray.planner.hardware import Hardware, Machine
from rlhf_ray.planner.roles import Role, RolloutRole, Workload


@dataclass(frozen=True)
class Chair:
    """Where one process sits.

    Attributes:
        rank: of the role; of an engine's worker its number among the workers of all engines.
        device: number of its device within the node; None on the CPU.
        first: of its engine's workers.
    """

    role: Role
    rank: int
    machine: Machine
    device: int | None
    first: bool = True


def seat_processes(workload: Workload, hardware: Hardware) -> list[Chair]:
    """All processes that hold a model.

    Raises:
        PlacementError: when a role has no place.
    """
    placements = {seat: placed.placement for seat, placed in workload.job.places.items()}
    assignment = assign(requests_of(placements), hardware.nodes)
    devices = _devices(placements, assignment)
    chairs = []
    for role in workload.roles:
        place = placements[role.seat]
        host = place.colocate or role.seat
        # A place of an engine of its own holds all its workers; a place of a role holds one process of each guest.
        seats = [
            (hardware.machine(node), device)
            for node, numbers in zip(assignment[host], devices[host], strict=True)
            for device in numbers
        ]
        workers = role.placement.tensor_parallel if isinstance(role, RolloutRole) else 1
        chairs += [
            Chair(role, rank, machine, device, rank % workers == 0) for rank, (machine, device) in enumerate(seats)
        ]
    return chairs


def _devices(
    placements: dict[str, RolePlacement | RolloutPlacement], assignment: Assignment
) -> dict[str, list[Sequence[int | None]]]:
    """Numbers of the devices of each place of each role, one for each process; None for a process on the CPU."""
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
