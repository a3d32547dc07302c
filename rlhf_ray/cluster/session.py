"""Joining a Ray cluster, or starting one on this machine."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError

from rlhf_ray.cluster.daemons import DaemonWatch, LastWords, Terminated, signals_end_in_order
from rlhf_ray.cluster.tokens import HOW_TO_GIVE_A_TOKEN, show_token
from rlhf_ray.cluster.topology import describe
from rlhf_ray.config.placement import Cluster

logger = logging.getLogger("rlhf_ray")

_ANSWER_S = 10.0

# Daemons without which nothing goes on, as Ray names them.
_INDISPENSABLE = frozenset({"gcs_server", "raylet"})


class ClusterError(Exception):
    """The cluster can't be joined or started."""


@contextmanager
def ray_session(cluster: Cluster, name: str, last_words: LastWords | None = None) -> Iterator[None]:
    """Be connected to Ray: to `cluster.address`, else to `RAY_ADDRESS`, which Ray jobs have, else to a local cluster
    that ends with the session.

    Args:
        last_words: called, from another thread, when the cluster is gone and this process is about to end for it.

    Raises:
        ClusterError: naming the address.
    """
    if ray.is_initialized():  # the caller's own session, as in tests and notebooks
        yield
        return
    try:
        _connect(cluster, name)
    except Exception as error:  # Ray raises that plain class when a node does not come up in time
        raise ClusterError(_why(cluster, error)) from error
    try:
        watch = _watch(last_words or _fail)
        try:
            with signals_end_in_order(watch):
                yield
        finally:
            watch.stop()
    finally:
        ray.shutdown()


def _watch(last_words: LastWords) -> DaemonWatch:
    """Watch the cluster that this process has just connected to."""
    node = ray._private.worker._global_node
    if node is not None and node.is_head():
        own = {
            name: process.process.pid for name, (process, *_) in node.all_processes.items() if name in _INDISPENSABLE
        }
        return DaemonWatch(own, None, last_words)
    if node is None:  # through Ray's proxy, which alone knows how to reach the head
        return DaemonWatch({}, None, last_words)
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return DaemonWatch({}, (host.strip("[]"), int(port)), last_words)


def _fail(error: BaseException) -> int:
    """The last words of a command that has none of its own."""
    if not isinstance(error, KeyboardInterrupt):
        logger.error("%s", error)
        return 1
    number = error.number if isinstance(error, Terminated) else signal.SIGINT
    logger.error("ended by %s", signal.Signals(number).name)
    return 128 + number


def _connect(cluster: Cluster, name: str) -> None:
    # The first failure ends a job with its own error; Ray would print those of all other calls after it.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    options: dict[str, Any] = {"namespace": name, "log_to_driver": False, "logging_level": logging.WARNING}
    address = joined_address(cluster)
    if address is not None:
        show_token(address)
        _check_answers(address)
        ray.init(address=address, **options)
        logger.info("joined the Ray cluster at %s", ray.get_runtime_context().gcs_address)
    else:  # "local" because Ray would otherwise join any cluster that it finds on this machine
        # Ray's workers are at niceness 15 by default. One busy process beside them would then starve one of a rank's
        # threads, and the others would wait for it at every step.
        system = {"worker_niceness": 0}
        ray.init(address="local", num_cpus=cluster.cpus, include_dashboard=False, _system_config=system, **options)
        logger.info("started a local Ray cluster with %s", describe(ray.cluster_resources()))


def joined_address(cluster: Cluster) -> str | None:
    """Address of the cluster that a session joins; None where it starts one on this machine."""
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


def _check_answers(address: str) -> None:
    """Ask once. Ray itself would try for up to a minute and a half, and write a line for each try.

    Raises:
        AuthenticationError, ConnectionError.
    """
    if "://" in address:
        return
    target = canonicalize_bootstrap_address_or_die(address)
    stub = NodeInfoGcsServiceStub(init_grpc_channel(target))
    try:
        stub.GetClusterId(GetClusterIdRequest(), timeout=_ANSWER_S)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise AuthenticationError(error.details()) from error
        raise ConnectionError(f"{target} does not answer: {error.details()}") from error


def _why(cluster: Cluster, error: Exception) -> str:
    """In words, with the cure."""
    address = joined_address(cluster)
    if address is None:
        return f"a local Ray cluster can't be started: {error}"
    setting = "cluster.address" if cluster.address else "RAY_ADDRESS"
    reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
    refused = isinstance(error, AuthenticationError)
    cure = HOW_TO_GIVE_A_TOKEN if refused else "check that Ray runs there (`ray status`), and give HOST:6379 or auto"
    return f"{setting}: can't connect to {address} ({reason}): {cure}"


def cluster_facts() -> dict[str, Any]:
    """Nodes and resources, for the manifest."""
    return {
        "gcs_address": ray.get_runtime_context().gcs_address,
        "nodes": [
            {"address": node["NodeManagerAddress"], "alive": node["Alive"], "resources": node["Resources"]}
            for node in ray.nodes()
        ],
    }
