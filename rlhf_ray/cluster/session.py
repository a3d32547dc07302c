"""Joining a Ray cluster, or starting one on this machine."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from rlhf_ray.cluster.topology import describe
from rlhf_ray.config.placement import Cluster

logger = logging.getLogger("rlhf_ray")


class ClusterError(Exception):
    """The cluster can't be joined or started."""


@contextmanager
def ray_session(cluster: Cluster, name: str) -> Iterator[None]:
    """Be connected to Ray: to `cluster.address`, else to `RAY_ADDRESS`, which Ray jobs have, else to a local cluster
    that ends with the session.

    Raises:
        ClusterError: naming the address.
    """
    if ray.is_initialized():  # the caller's own session, as in tests and notebooks
        yield
        return
    try:
        _connect(cluster, name)
    except Exception as error:  # Ray raises that plain class when a node does not come up in time
        where = cluster.address or "a local cluster"
        raise ClusterError(
            f"cluster.address: can't connect to {where} ({error}); check that `ray status` works there"
        ) from error
    try:
        with sigterm_raises():
            yield
    finally:
        ray.shutdown()


class Terminated(KeyboardInterrupt):
    """SIGTERM came, which is how schedulers end a job."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """End in order at SIGTERM, as at Ctrl-C; Ray's own handler, which `ray.init` installs, aborts the process. A second
    SIGTERM ends it at once."""
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _connect(cluster: Cluster, name: str) -> None:
    # The first failure ends a job with its own error; Ray would print those of all other calls after it.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    options: dict[str, Any] = {"namespace": name, "log_to_driver": False, "logging_level": logging.WARNING}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        ray.init(address=address, **options)
        logger.info("joined the Ray cluster at %s", ray.get_runtime_context().gcs_address)
    else:  # "local" because Ray would otherwise join any cluster that it finds on this machine
        # Ray's workers are at niceness 15 by default. One busy process beside them would then starve one of a rank's
        # threads, and the others would wait for it at every step.
        system = {"worker_niceness": 0}
        ray.init(address="local", num_cpus=cluster.cpus, include_dashboard=False, _system_config=system, **options)
        logger.info("started a local Ray cluster with %s", describe(ray.cluster_resources()))


def cluster_facts() -> dict[str, Any]:
    """Nodes and resources, for the manifest."""
    return {
        "gcs_address": ray.get_runtime_context().gcs_address,
        "nodes": [
            {"address": node["NodeManagerAddress"], "alive": node["Alive"], "resources": node["Resources"]}
            for node in ray.nodes()
        ],
    }
