"""Whether all roles have bundles, and on which nodes."""

from collections.abc import Sequence
from dataclasses import replace

from rlhf_ray.cluster.assignment import Assignment, PlacementError, Request, assign, can_take, requests_of
from rlhf_ray.cluster.preflight.report import Check
from rlhf_ray.cluster.topology import Node
from rlhf_ray.config.jobs import Job

Seats = dict[str, tuple[Node, ...]]


def check_placement(config: Job, nodes: Sequence[Node]) -> tuple[Check, Seats]:
    """The check, and the nodes of each role, as `View.seats`."""
    requests = requests_of(config.placements)
    whole = [replace(node, free=node.resources) for node in nodes]
    problems = _problems(requests, whole)
    chosen: Assignment = {}
    if problems:
        # Where a role has no place, the nodes that could take a part of it.
        chosen = {request.role: [node for node in nodes if can_take(request, node)] for request in requests}
        check = Check("placement", "", tuple(problems))
        if config.cluster.autoscaling:
            check = Check("placement", f"the autoscaler has to add nodes: {problems[0]}", skipped=True)
    else:
        try:
            chosen = assign(requests, nodes)
            detail = _words(chosen)
        except PlacementError as error:
            chosen = assign(requests, whole)
            detail = f"fits once others have left: {error}"
        check = Check("placement", detail)
    seats = {role: chosen[placement.colocate or role] for role, placement in config.placements.items()}
    return check, {role: tuple(places) for role, places in seats.items()}


def _problems(requests: Sequence[Request], nodes: Sequence[Node]) -> list[str]:
    """What does not fit: each role that would not even alone, else the first that does not beside the others."""
    alone = [problem for request in requests for problem in _problem([request], nodes)]
    return alone or _problem(requests, nodes)


def _problem(requests: Sequence[Request], nodes: Sequence[Node]) -> list[str]:
    try:
        assign(requests, nodes)
    except PlacementError as error:
        return [str(error)]
    return []


def _words(chosen: Assignment) -> str:
    """`policy on a, b; rollout on c`."""
    on = {role: ", ".join(dict.fromkeys(node.name for node in places)) for role, places in chosen.items()}
    return "; ".join(f"{role} on {names}" for role, names in on.items())
