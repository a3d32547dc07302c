"""Where other processes find this one."""

import socket

import ray


def own_address() -> tuple[str, int]:
    """Address of this node and a port that is free on it."""
    host = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((host, 0))
        return host, int(probe.getsockname()[1])
