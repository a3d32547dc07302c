"""Clocks, ports and collectives between the nodes."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Literal

from rlhf_ray.cluster.preflight.asked import Transfer, describe_bytes, transfers
from rlhf_ray.cluster.preflight.judge import Clock, judge_broadcast, judge_clocks, judge_reach
from rlhf_ray.cluster.preflight.links import LinkProbe
from rlhf_ray.cluster.preflight.probe import CONNECT_S
from rlhf_ray.cluster.preflight.probing import Deadline, Probes, probes
from rlhf_ray.cluster.preflight.report import Broadcast, Check
from rlhf_ray.cluster.preflight.view import View
from rlhf_ray.cluster.topology import Node
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.number_formats import on_gpus
from rlhf_ray.config.placement import RolePlacement, RolloutPlacement
from rlhf_ray.models.shapes import ShapeError

Backend = Literal["nccl", "gloo"]

_PINGS = 3
_ANSWER_S = 5.0
GROUP_S: Mapping[Backend, float] = {"gloo": 15.0, "nccl": 60.0}
"""Until a group of processes has met and sent something. NCCL starts CUDA, looks at the machine's topology and opens
its connections in the first broadcast, which takes tens of seconds on a machine with many GPUs."""
_HARDLY_A_GPU = 0.01

Links = Mapping[Backend, tuple[Sequence[Node], Probes]]
"""Nodes of each backend's group, and the probes on them."""


def check_clocks(view: View) -> Check:
    """Ask every node for the time; the quickest of a few answers is the most exact."""
    if len(view.nodes) == 1:
        return Check("clocks", "there is one node", skipped=True)
    clocks: dict[str, Clock] = {}
    for node in view.nodes:
        for _ in range(_PINGS):
            asked, began = time.time(), time.perf_counter()
            answer, _ = view.probes.ask("now", {node.name: ()}, _ANSWER_S)
            within = (time.perf_counter() - began) / 2
            if node.name in answer and within < clocks.get(node.name, Clock(0, float("inf"))).within_s:
                clocks[node.name] = Clock(answer[node.name] - asked - within, within)
    largest = max((abs(clock.ahead_s) for clock in clocks.values()), default=0.0)
    exact = max((clock.within_s for clock in clocks.values()), default=0.0)
    detail = f"at most {largest:.3f} s apart, measured to {exact:.3f} s"
    return Check("clocks", detail, tuple(judge_clocks(clocks)))


def check_ports(view: View) -> Check:
    """Have every node of a role open a port, and every other connect to it."""
    names = [node.name for node in view.of(view.seats)]
    if not names:
        return Check("ports", "no role has bundles", skipped=True)
    ports, closed = view.probes.ask("listen", {name: (view.addresses[name],) for name in names}, _ANSWER_S)
    problems = [
        f"node {name}: can't open a port at its own address {view.addresses[name]} ({reason}): start Ray there with "
        "the address that the other nodes know (--node-ip-address)"
        for name, reason in closed.items()
    ]
    targets = {name: (view.addresses[name], port) for name, port in ports.items()}
    others = {
        name: ({other: at for other, at in targets.items() if other != name or len(names) == 1},) for name in names
    }
    failed, _ = view.probes.ask("reach", others, _ANSWER_S + CONNECT_S)
    problems += judge_reach(view.addresses, failed)
    pairs = sum(len(each) for (each,) in others.values())
    return Check("ports", f"{pairs} connections from node to node" if len(names) > 1 else "opened", tuple(problems))


@contextmanager
def link_probes(config: Job, seats: Mapping[str, Sequence[Node]], limit_s: float) -> Iterator[Links]:
    """Start the groups of processes that will measure, one for each backend whose roles are on several nodes. Where one
    needs longer to meet than gloo does, so much is added to the limit."""
    with ExitStack() as stack:
        links: dict[Backend, tuple[Sequence[Node], Probes]] = {}
        kinds: tuple[tuple[Backend, bool], ...] = (("nccl", True), ("gloo", False))
        for backend, with_gpus in kinds:
            roles = {
                role: placement for role, placement in config.placements.items() if on_gpus(config, role) == with_gpus
            }
            nodes = list({node.node_id: node for role in roles for node in seats[role]}.values())
            if len(nodes) > 1:
                options = {"num_gpus": _HARDLY_A_GPU * with_gpus, "runtime_env": {"env_vars": _interfaces(roles)}}
                links[backend] = (
                    nodes,
                    stack.enter_context(
                        probes(LinkProbe, nodes, Deadline(limit_s + GROUP_S[backend] - GROUP_S["gloo"]), **options)
                    ),
                )
        yield links


def check_links(view: View, links: Links) -> tuple[Check, list[Broadcast]]:
    """Time a broadcast over the nodes of each group."""
    if not links:
        return Check("links", "no roles on several nodes have to talk", skipped=True), []
    limits: list[Transfer] = []
    with suppress(ShapeError):  # there is nothing to compare with then; the check of the disk says why
        limits = list(transfers(view.config))
    problems: list[str] = []
    broadcasts = []
    for backend, (nodes, group) in links.items():
        measured, failed = _broadcast(view, backend, nodes, group)
        problems += failed
        if measured is not None:
            broadcasts.append(measured)
            problems += judge_broadcast(measured, limits)
    words = [
        f"{each.backend}: {describe_bytes(each.size)} from {each.source}, "
        f"{describe_bytes(min(each.speeds.values()))}/s to the slowest of {len(each.seconds)}"
        for each in broadcasts
    ]
    return Check("links", "; ".join(words), tuple(problems)), broadcasts


def _broadcast(
    view: View, backend: Backend, nodes: Sequence[Node], group: Probes
) -> tuple[Broadcast | None, list[str]]:
    source, *others = (node.name for node in nodes)
    limit_s = GROUP_S[backend]
    meeting, raised = group.ask("address", {source: (view.addresses[source],)}, limit_s)
    if source in meeting:
        host, port = meeting[source]
        places = {
            name: (backend, rank, len(nodes), view.addresses[name], host, port, limit_s)
            for rank, name in enumerate([source, *others])
        }
        measured, raised = group.ask("broadcast", places, limit_s)
        if len(measured) == len(nodes):
            size = measured[source][0]
            return Broadcast(backend, source, size, {name: measured[name][1] for name in others}), []
    names = ", ".join([source, *others])
    reasons = "; ".join(f"node {name}: {reason}" for name, reason in (raised | group.lost).items())
    problem = (
        f"links: nodes {names} can't form a {backend} group ({reasons}): let TCP through between them on all ports, "
        "and name their common network with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME in placement.ROLE.env"
    )
    return None, [problem]


def _interfaces(roles: Mapping[str, RolePlacement | RolloutPlacement]) -> dict[str, str]:
    """What the roles tell their own collectives."""
    named = [item for placement in roles.values() for item in placement.env.items()]
    return {name: value for name, value in named if name.startswith(("NCCL_", "GLOO_"))}
