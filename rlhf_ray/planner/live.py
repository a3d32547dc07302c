"""The machines of a running Ray cluster."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config.placement import Cluster
from rlhf_ray.planner.hardware import Hardware, of_ray


@contextmanager
def live_hardware(address: str) -> Iterator[Hardware]:
    """What Ray reports of its nodes, and what of them is free now.

    Raises:
        ClusterError: when there is no cluster at `address`.
        PlanError: when its devices are of a kind that is not known.
    """
    with ray_session(Cluster(address=address), "plan"):
        yield of_ray(ray.nodes(), ray._private.state.available_resources_per_node(), address)
