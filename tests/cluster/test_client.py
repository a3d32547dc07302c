"""Looking at somebody else's cluster leaves nothing behind."""

import multiprocessing
import socket

import pytest

from rlhf_ray.cluster import client
from rlhf_ray.cluster.client import ClusterClient
from rlhf_ray.cluster.session import ClusterError


def test_a_cluster_that_takes_connections_and_never_answers_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_JOIN_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(ClusterError, match="does not answer within"):
            ClusterClient(f"127.0.0.1:{silent.getsockname()[1]}", 1.0)
        assert multiprocessing.active_children() == []
