"""What all checks look at."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rlhf_ray.cluster.preflight.probing import Probes
from rlhf_ray.cluster.topology import Node
from rlhf_ray.config.jobs import Job


@dataclass(frozen=True)
class View:
    """A cluster, and what a job is going to do with it.

    Attributes:
        config: of the job.
        nodes: all of the cluster.
        home: node of this process, the controller's.
        addresses: of the nodes, by name.
        seats: nodes of each role that has actors; of one that fits nowhere, those that could take a bundle of it.
        probes: one on each node.
    """

    config: Job
    nodes: tuple[Node, ...]
    home: Node
    addresses: Mapping[str, str]
    seats: Mapping[str, tuple[Node, ...]]
    probes: Probes

    def of(self, roles: Iterable[str], *, with_home: bool = False) -> list[Node]:
        """Nodes of some roles, each once, this process's own first where it is wanted."""
        found = [self.home] if with_home else []
        found += [node for role in roles for node in self.seats.get(role, ())]
        return list({node.node_id: node for node in found}.values())
