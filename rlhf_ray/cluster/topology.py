"""What the nodes of a cluster offer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        name: for people: the address, or its name in a cluster file.
        resources: all that Ray counts there.
        free: what of it no actor holds.
        labels: Ray's node labels.
        node_id: Ray's; the name again for a node of a cluster file.
    """

    name: str
    resources: dict[str, float]
    free: dict[str, float]
    labels: dict[str, str]
    node_id: str
