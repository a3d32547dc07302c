"""Reserving bundles for all roles of a job at once, each on a node that was chosen for it."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import uuid4

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.cluster.assignment import Assignment, PlacementError, Request, assign
from rlhf_ray.cluster.topology import Node, live_nodes

logger = logging.getLogger("rlhf_ray")

_NODE_LABEL = "ray.io/node-id"


@dataclass(frozen=True)
class Bundle:
    """What is reserved for one rank or engine.

    Attributes:
        group, index: the placement group, and which of its bundles it is.
        node: that has it.
        devices: ids of its GPUs on that node; empty on CPU.
    """

    group: PlacementGroup
    index: int
    node: Node
    devices: tuple[str, ...]


class Reservation:
    """Bundles of roles, in rank order: by node, and on a node by device, so that neighbours are neighbours."""

    def __init__(self, bundles: dict[str, list[Bundle]]) -> None:
        self._bundles = bundles

    def of(self, role: str) -> list[Bundle]:
        """The bundles of a role."""
        return self._bundles[role]

    def release(self) -> None:
        """Give all of them back."""
        for bundles in self._bundles.values():
            remove_placement_group(bundles[0].group)
        self._bundles = {}


def reserve(requests: Sequence[Request], timeout_s: float, *, autoscaling: bool = False) -> Reservation:
    """Reserve what all roles ask for.

    What no node has, even when everything is free, is an error at once, unless nodes come when asked for
    (`autoscaling`); what others hold is waited for.

    Raises:
        PlacementError: naming role, bundle, and what each node lacks.
    """
    deadline = time.monotonic() + timeout_s
    asked_for_nodes = False
    try:
        while True:
            nodes = live_nodes()
            try:
                chosen = assign(requests, nodes)
            except PlacementError:
                if not autoscaling:
                    assign(requests, [replace(node, free=node.resources) for node in nodes])
                elif not asked_for_nodes:
                    _ask_for_nodes(requests)
                    asked_for_nodes = True
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)
                continue
            reserved = _reserve(requests, chosen, min(_ATTEMPT_S, max(1.0, deadline - time.monotonic())))
            if reserved is not None:
                return reserved
            if time.monotonic() > deadline:
                role = requests[0].role
                message = f"placement: others took what was free, again and again within {timeout_s:g} s"
                raise PlacementError(role, f"{message}; wait, or raise placement.placement_timeout_s", 0, {})
    finally:
        if asked_for_nodes:
            request_resources(bundles=[])  # what is reserved keeps its nodes; the rest may go again


# Ray's view of what is free lags a little behind what is reserved, and another job may be faster.
_POLL_S = 0.5
_ATTEMPT_S = 10.0


def _ask_for_nodes(requests: Sequence[Request]) -> None:
    logger.info("asking the cluster's autoscaler for nodes")
    request_resources(
        bundles=[request.resources for request in requests for _ in range(request.bundles)],
        bundle_label_selectors=[request.labels for request in requests for _ in range(request.bundles)],
    )


def _reserve(requests: Sequence[Request], chosen: Assignment, timeout_s: float) -> Reservation | None:
    """None when the chosen nodes had given away the bundles by then."""
    deadline = time.monotonic() + timeout_s
    groups = {
        request.role: placement_group(
            [request.resources] * request.bundles,
            strategy="PACK",
            # Names must differ within a namespace, and two runs of one config share theirs.
            name=f"{request.role}-{uuid4().hex[:8]}",
            bundle_label_selector=[{_NODE_LABEL: node.node_id} for node in chosen[request.role]],
        )
        for request in requests
    }
    reservation = Reservation(
        {
            role: [Bundle(group, index, node, ()) for index, node in enumerate(chosen[role])]
            for role, group in groups.items()
        }
    )
    for group in groups.values():
        if not group.wait(max(0.0, deadline - time.monotonic())):
            reservation.release()
            return None
    return Reservation({request.role: _by_device(request, reservation.of(request.role)) for request in requests})


def _by_device(request: Request, bundles: list[Bundle]) -> list[Bundle]:
    """Bundles of one node in the order of their GPUs, which Ray hands out as it likes."""
    gpus = request.resources.get("GPU", 0.0)
    if not gpus:
        return bundles
    probes = [
        _device_ids.options(
            num_gpus=gpus, scheduling_strategy=PlacementGroupSchedulingStrategy(bundle.group, bundle.index)
        ).remote()
        for bundle in bundles
    ]
    found = [
        replace(bundle, devices=tuple(ids)) for bundle, ids in zip(bundles, ray.get(probes, timeout=60), strict=True)
    ]
    order = {id(node): number for number, node in enumerate({id(p.node): p.node for p in bundles}.values())}
    return sorted(found, key=lambda bundle: (order[id(bundle.node)], [_rank_of(device) for device in bundle.devices]))


def _rank_of(device: str) -> tuple[int, str]:
    """Sorts numbered devices by number. A node whose devices are shown by name, such as `GPU-8f3a…` or `MIG-5c1e…`, has
    no order that is known; their names give one that stays."""
    return (int(device), "") if device.isdecimal() else (0, device)


@ray.remote(num_cpus=0, max_retries=0)
def _device_ids() -> list[str]:
    return ray.get_runtime_context().get_accelerator_ids()["GPU"]
