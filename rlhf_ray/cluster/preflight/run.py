"""All checks of a cluster, in half a minute at most, and a little over a minute where GPUs of several nodes meet."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError

from rlhf_ray.cluster.preflight.contents import check_contents
from rlhf_ray.cluster.preflight.network import check_clocks, check_links, check_ports, link_probes
from rlhf_ray.cluster.preflight.placing import check_placement
from rlhf_ray.cluster.preflight.probe import NodeProbe
from rlhf_ray.cluster.preflight.probing import Deadline, Probes, node_probes
from rlhf_ray.cluster.preflight.report import Check, Report
from rlhf_ray.cluster.preflight.storage import check_storage
from rlhf_ray.cluster.preflight.view import View
from rlhf_ray.cluster.topology import live_nodes
from rlhf_ray.config.jobs import Job

LIMIT_S = 28.0
"""Of all checks together, on CPU."""


def preflight(config: Job) -> Report:
    """Look at every node of the cluster that this process is connected to. Loads no model and leaves nothing behind."""
    began, deadline = time.monotonic(), Deadline(LIMIT_S)
    nodes = live_nodes()
    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    home = ray.get_runtime_context().get_node_id()
    placement, seats = check_placement(config, nodes)
    with ExitStack() as stack:
        own = stack.enter_context(node_probes(NodeProbe, nodes, deadline))
        links = stack.enter_context(link_probes(config, seats, LIMIT_S))
        view = View(
            config,
            tuple(nodes),
            next(node for node in nodes if node.node_id == home),
            {node.name: alive[node.node_id] for node in nodes},
            seats,
            own,
        )
        found = [*check_contents(view), *check_storage(view), check_clocks(view), check_ports(view)]
        linked, broadcasts = check_links(view, links)
    checks = (placement, _presence(len(nodes), own), *found, linked)
    ids = {node.name: node.node_id for node in nodes}
    return Report(checks, ids, tuple(broadcasts), time.monotonic() - began)


def _presence(nodes: int, probed: Probes) -> Check:
    """Whether all nodes lasted."""
    problems = [
        f"node {name}: {reason}. Look at it with `ray list nodes`; bring it back or take it out of the cluster, and "
        "start again"
        for name, reason in probed.lost.items()
    ]
    return Check("nodes", "1 answers" if nodes == 1 else f"{nodes} answer", tuple(problems))


@contextmanager
def naming_lost_nodes(report: Report) -> Iterator[None]:
    """Whatever fails in here also tells of the nodes that have left the cluster since the report."""
    try:
        yield
    except Exception as error:
        with suppress(RayError, RuntimeError):  # the cluster as a whole may be what failed
            with ThreadPoolExecutor(32) as threads:
                answering = {node_id for node_id in threads.map(_answers, ray.nodes()) if node_id is not None}
            for name in (name for name, node_id in report.node_ids.items() if node_id not in answering):
                error.add_note(f"Node {name} was there at the preflight and has left the cluster since.")
        raise


def _answers(node: dict[str, Any]) -> str | None:
    """The id of a node whose daemon listens; of one that has died the cluster's head learns later than its peers."""
    try:
        if node["Alive"]:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=3).close()
    except OSError:
        return None
    return str(node["NodeID"]) if node["Alive"] else None
