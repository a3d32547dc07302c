"""The nodes of a cluster and what they offer."""

from collections import Counter
from dataclasses import dataclass, field
from ipaddress import ip_address

import ray


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        name: its address, for people.
        resources: what it has, by Ray's names (`CPU`, `GPU`, custom ones).
        free: what of them nobody has reserved.
        labels: Ray's labels, those that Ray sets itself too.
        node_id: Ray's hexadecimal id; empty for a node that is only planned.
    """

    name: str
    resources: dict[str, float]
    free: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)
    node_id: str = ""


def live_nodes() -> list[Node]:
    """Nodes that are alive, neighbours by address next to each other."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    free = ray._private.state.available_resources_per_node()
    seen = Counter(node["NodeManagerAddress"] for node in alive)
    alive.sort(key=lambda node: (_order(node["NodeManagerAddress"]), node["NodeID"]))
    return [
        Node(
            address if seen[address := node["NodeManagerAddress"]] == 1 else f"{address} ({node['NodeID'][:8]})",
            node["Resources"],
            free.get(node["NodeID"], {}),
            node["Labels"],
            node["NodeID"],
        )
        for node in alive
    ]


def _order(address: str) -> tuple[int, int, str]:
    try:
        number = ip_address(address)
    except ValueError:
        return (0, 0, address)
    return (number.version, int(number), address)


def describe(resources: dict[str, float]) -> str:
    """`2 CPU, 1 GPU` from a resource table, without memory, and without what Ray marks its nodes with."""
    counted = {key: amount for key, amount in resources.items() if amount and not key.startswith(_UNCOUNTED)}
    ordered = sorted(counted, key=lambda key: (key != "CPU", key != "GPU", key))
    return ", ".join(f"{counted[key]:g} {key}" for key in ordered) or "no CPU or GPU"


_UNCOUNTED = ("memory", "object_store_memory", "node:", "accelerator_type:")
