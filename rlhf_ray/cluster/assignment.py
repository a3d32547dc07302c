"""Which node each bundle of each role goes to: a pure function of what is asked for and what the nodes have.

Deciding it here, instead of leaving it to Ray's scheduler, numbers ranks by node, says exactly what does not fit, and
lets the planner ask the same question of a cluster that does not exist yet.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

from rlhf_ray.cluster.topology import Node, describe
from rlhf_ray.config.placement import RolePlacement, RolloutPlacement, Strategy


@dataclass(frozen=True)
class Request:
    """The bundles that a role asks for, all alike.

    Attributes:
        role: as in `placement.<role>`.
        bundles: one for each rank or engine.
        resources: of one bundle, which is never divided between nodes.
        strategy: as in `placement.<role>.strategy`.
        nodes: how many nodes share the bundles equally; None leaves it to the strategy.
        labels: selectors that a node must meet.
        block: so many bundles in a row must share a node.
    """

    role: str
    bundles: int
    resources: dict[str, float]
    strategy: Strategy = "PACK"
    nodes: int | None = None
    labels: dict[str, str] = field(default_factory=dict)
    block: int = 1


def requests_of(placements: Mapping[str, RolePlacement | RolloutPlacement]) -> list[Request]:
    """What the roles of a job ask for; one that sits with another asks for nothing."""
    engines = placements.get("rollout")
    blocks: dict[str | None, int] = {}
    if isinstance(engines, RolloutPlacement):
        blocks[engines.colocate] = engines.tensor_parallel
    return [
        _request(role, placement, blocks.get(role, 1))
        for role, placement in placements.items()
        if placement.colocate is None
    ]


def _request(role: str, placement: RolePlacement | RolloutPlacement, block: int) -> Request:
    if isinstance(placement, RolloutPlacement):
        bundles, workers = placement.engines * placement.nodes_per_engine, placement.workers_per_node
    else:
        bundles, workers = placement.ranks or 1, 1
    each = {"CPU": placement.cpus, "GPU": float(placement.gpus), **placement.resources}
    # Ray has no empty bundles.
    resources = {key: amount * workers for key, amount in each.items() if amount} or {"CPU": 0.001}
    return Request(role, bundles, resources, placement.strategy, placement.nodes, placement.labels, block)


class PlacementError(Exception):
    """A role has no bundle in the cluster.

    Attributes:
        role: the role, as in `placement.<role>`.
        bundle: number of the first of its bundles that no node can take.
        lacking: for each node by name, what it lacks: a resource, or `label NAME`.
    """

    def __init__(self, role: str, message: str, bundle: int, lacking: dict[str, str]) -> None:
        self.role, self.bundle, self.lacking = role, bundle, lacking
        self._message = message
        super().__init__(message)

    def __reduce__(self) -> tuple[type["PlacementError"], tuple[str, str, int, dict[str, str]]]:
        return type(self), (self.role, self._message, self.bundle, self.lacking)


Assignment = dict[str, list[Node]]


def assign(requests: Sequence[Request], nodes: Sequence[Node]) -> Assignment:
    """The node of each bundle of each role; a role's bundles on one node follow each other, in the nodes' order.

    Roles that fit on the fewest nodes choose first; where that fails, every other order is tried.

    Raises:
        PlacementError: naming the first role and bundle without a node, and what each node lacks.
    """
    hardest_first = sorted(requests, key=lambda request: _choices(request, nodes))
    first_error = None
    for order in permutations(hardest_first):
        try:
            return _in_order(order, nodes)
        except PlacementError as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def matches(selector: str, value: str | None) -> bool:
    """Whether a label, None where a node has none, meets `value`, `!value`, `in(a, b)` or `!in(a, b)`."""
    opposite = selector.startswith("!")
    wanted = re.split(r", ?", selector.removeprefix("!").removeprefix("in(").removesuffix(")"))
    return (value in wanted) != opposite


def can_take(request: Request, node: Node) -> bool:
    """Whether a node has what one block of a role's bundles takes, when nobody else takes any of it."""
    return _capacity(request, node, node.resources) > 0


def _in_order(requests: Sequence[Request], nodes: Sequence[Node]) -> Assignment:
    free = {id(node): dict(node.free) for node in nodes}
    taken: Assignment = {}
    for request in requests:
        counts = _spread(request, nodes, free)
        taken[request.role] = [node for node, count in zip(nodes, counts, strict=True) for _ in range(count)]
        for node, count in zip(nodes, counts, strict=True):
            for key, amount in request.resources.items():
                free[id(node)][key] = free[id(node)].get(key, 0.0) - amount * count
    return taken


def _choices(request: Request, nodes: Sequence[Node]) -> int:
    """Bundles of this role that all nodes together could take if it came first."""
    return sum(_capacity(request, node, node.free) for node in nodes)


def _capacity(request: Request, node: Node, free: dict[str, float]) -> int:
    """Bundles that a node can take, a multiple of the block."""
    if any(not matches(selector, node.labels.get(label)) for label, selector in request.labels.items()):
        return 0
    # Ray counts in ten-thousandths: without rounding, sums of shares would miss the whole by less than that.
    room = [int(round(free.get(key, 0.0) / amount, 4)) for key, amount in request.resources.items()]
    return min(room, default=request.bundles) // request.block * request.block


def _spread(request: Request, nodes: Sequence[Node], free: dict[int, dict[str, float]]) -> list[int]:
    """How many bundles each node takes."""
    room = [_capacity(request, node, free[id(node)]) for node in nodes]
    each = _each(request)
    if each is not None:
        # The tightest nodes that do, so that the others stay whole.
        able = sorted((number for number, bundles in enumerate(room) if bundles >= each), key=lambda n: (room[n], n))
        chosen = able[: request.bundles // each]
        counts = [each * (number in chosen) for number in range(len(nodes))]
    else:
        counts = (_evenly if request.strategy == "SPREAD" else _tightly)(room, request)
    if sum(counts) < request.bundles:
        raise _error(request, counts, nodes, free)
    return counts


def _each(request: Request) -> int | None:
    """Places that every node of the role takes; None where they may differ."""
    if request.nodes is not None:
        return request.bundles // request.nodes
    return {"STRICT_PACK": request.bundles, "STRICT_SPREAD": 1}.get(request.strategy)


def _evenly(room: Sequence[int], request: Request) -> list[int]:
    counts = [0] * len(room)
    while sum(counts) < request.bundles:
        open_nodes = [number for number in range(len(room)) if counts[number] < room[number]]
        if not open_nodes:
            break
        number = min(open_nodes, key=lambda n: (counts[n], counts[n] - room[n], n))
        counts[number] += request.block
    return counts


def _tightly(room: Sequence[int], request: Request) -> list[int]:
    counts = [0] * len(room)
    while left := request.bundles - sum(counts):
        open_nodes = [number for number in range(len(room)) if room[number] and not counts[number]]
        if not open_nodes:
            break
        # The tightest node that takes all that is left, else the roomiest.
        enough = [number for number in open_nodes if room[number] >= left]
        number = min(enough, key=lambda n: room[n]) if enough else max(open_nodes, key=lambda n: room[n])
        counts[number] = min(room[number], left)
    return counts


def _error(
    request: Request, counts: Sequence[int], nodes: Sequence[Node], free: dict[int, dict[str, float]]
) -> PlacementError:
    role, each = f"placement.{request.role}", _each(request)
    lacking = {
        node.name: _lack(request, node, free[id(node)], count, each) for node, count in zip(nodes, counts, strict=True)
    }
    need = describe(request.resources) + "".join(f", {label}={value}" for label, value in request.labels.items())
    group = "" if each in (None, 1) else f", {each} on each node"
    table = "; ".join(f"{name} {lack}" for name, lack in lacking.items()) or "the cluster has none"
    bundle = sum(counts)
    return PlacementError(
        request.role,
        f"{role}: bundle {bundle} of {request.bundles} ({need}{group}) has no node: {table}. Ask for less in {role}, "
        "wait for what other jobs hold, or add nodes (on one machine, cluster.cpus sets how many CPUs Ray counts)",
        bundle,
        lacking,
    )


def _lack(request: Request, node: Node, free: dict[str, float], count: int, each: int | None) -> str:
    for label, selector in request.labels.items():
        if not matches(selector, value := node.labels.get(label)):
            return f"has {'no label' if value is None else f'{value} as'} {label}"
    bundles = each or request.block
    for key, amount in request.resources.items():
        total, left = node.resources.get(key, 0.0), free.get(key, 0.0) - amount * count
        if total < amount * bundles:
            return f"has {total:g} {key}"
        if left < amount * bundles:
            return f"has {left:g} of {total:g} {key} free"
    return f"takes {count}"
