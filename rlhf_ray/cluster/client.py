"""Looking at a Ray cluster that somebody else started, from a process that must outlive it."""

import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import ray

from rlhf_ray.cluster.session import ClusterError
from rlhf_ray.cluster.tokens import HOW_TO_GIVE_A_TOKEN, show_token

T = TypeVar("T")

_CONNECT_S = 3.0
_JOIN_S = 40.0  # a GCS that refuses a token is asked again for 20 s


class ClusterClient:
    """A child process that is connected to a cluster and answers questions about it.

    Ray ends a process whose cluster goes away, and can be a minute over it: here that is the child.

    Args:
        address: `host:port` of the cluster's head, `ray://host:port` of its proxy, or `auto`.
        timeout_s: how long an answer may take.

    Raises:
        ClusterError: nothing answers there.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self._address, self._timeout_s = address, timeout_s
        _check_that_somebody_listens(address)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, address), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._receive(_JOIN_S)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the child."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def ask(self, question: Callable[..., T], *args: Any) -> T:
        """What a function, which must be one of a module, gives in the child.

        Raises:
            ClusterError: the cluster does not answer any more.
            Exception: what the function raised.
        """
        try:
            self._connection.send((question, args))
        except OSError:
            raise self._gone() from None
        return self._receive(self._timeout_s)

    def _receive(self, timeout_s: float) -> Any:
        try:
            if not self._connection.poll(timeout_s):
                raise self._gone(f" within {timeout_s:g} s")
            answer = self._connection.recv()
        except (EOFError, OSError):  # a process that is killed resets the connection
            raise self._gone() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _gone(self, when: str = "") -> ClusterError:
        return ClusterError(f"the Ray cluster at {self._address} does not answer{when}")


def _serve(connection: Connection, address: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the parent ends this process
    # Ray writes every try to stderr; what comes of them is in the exception.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # A local cluster goes by an address that others can reach.
    show_token("auto" if _is_here(address) else address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:  # Ray raises that plain class when it can't connect in time
        cure = f"if it asks for a token, {HOW_TO_GIVE_A_TOKEN}"
        connection.send(ClusterError(f"can't connect to the Ray cluster at {address} ({error}); {cure}"))
        return
    connection.send(None)
    while True:
        try:
            question, args = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = question(*args)
        except Exception as error:
            answer = error
        connection.send(answer)


def _is_here(address: str) -> bool:
    """Whether it is an address of this machine, the only kind that can be bound."""
    host, _ = _host_and_port(address)
    try:
        with socket.create_server((host, 0)):
            return host != ""
    except OSError:
        return False


def _host_and_port(address: str) -> tuple[str, str]:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    return host.strip("[]"), port


def _check_that_somebody_listens(address: str) -> None:
    """Ray takes minutes to find out."""
    if address == "auto":
        return
    scheme = address.rpartition("://")[0]
    host, port = _host_and_port(address)
    if scheme not in ("", "ray") or not host or not port.isdecimal():
        raise ClusterError(
            f"{address!r} is no address of a Ray cluster: give host:port of its head (6379 is usual), or "
            "ray://host:port from outside of it (10001 is usual)"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster answers at {address}: {error}") from error
