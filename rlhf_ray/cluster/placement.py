"""Reserving places for actors, with an error that says what does not fit."""

from uuid import uuid4

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rlhf_ray.cluster.session import describe_resources


class PlacementError(Exception):
    """A role has no place in the cluster.

    Attributes:
        role: the role, as in `placement.<role>`.
        bundle: number of the first bundle that fits on no node, None when each fits alone.
    """

    def __init__(self, role: str, message: str, bundle: int | None = None) -> None:
        self.role, self.bundle = role, bundle
        self._message = message
        super().__init__(message)

    def __reduce__(self) -> tuple[type["PlacementError"], tuple[str, str, int | None]]:
        return type(self), (self.role, self._message, self.bundle)


def reserve(role: str, bundles: list[dict[str, float]], strategy: str, timeout_s: float) -> PlacementGroup:
    """Reserve one bundle for each rank or engine of a role.

    Raises:
        PlacementError: after `timeout_s`, naming the bundle that can't be placed and what the cluster has.
    """
    # Names must differ within a namespace, and two runs of one config share theirs.
    group = placement_group(bundles, strategy=strategy, name=f"{role}-{uuid4().hex[:8]}")
    if group.wait(timeout_s):
        return group
    remove_placement_group(group)
    raise _error(role, bundles, strategy, timeout_s)


def _error(role: str, bundles: list[dict[str, float]], strategy: str, timeout_s: float) -> PlacementError:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    free = ray._private.state.available_resources_per_node()
    table = "; ".join(
        f"node {node['NodeManagerAddress']} has {describe_resources(node['Resources'])}"
        f" ({describe_resources(free.get(node['NodeID'], {}))} free)"
        for node in nodes
    )
    for number, bundle in enumerate(bundles):
        if not any(all(node["Resources"].get(key, 0) >= amount for key, amount in bundle.items()) for node in nodes):
            return PlacementError(
                role,
                f"placement.{role}: bundle {number} of {len(bundles)} needs {describe_resources(bundle)} on one node, "
                f"which no node has: {table}. Ask for less in placement.{role}, or add nodes",
                number,
            )
    total = {key: sum(bundle.get(key, 0) for bundle in bundles) for key in ("CPU", "GPU")}
    return PlacementError(
        role,
        f"placement.{role}: {len(bundles)} bundles with {describe_resources(total)} in all ({strategy}) were not "
        f"placed within {timeout_s:g} s: {table}. Other roles or jobs hold the rest: ask for less in "
        "placement, wait, or add nodes (on one machine, cluster.cpus sets how many CPUs Ray counts)",
    )
