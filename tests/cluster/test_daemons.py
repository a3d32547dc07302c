"""A process whose cluster goes away ends within seconds, with its last words, even while it hangs in Ray."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

# The main thread hangs outside of Python, as it does in a call of Ray's to a cluster that is gone.
HANGS = """
import ctypes, subprocess, sys
from rlhf_ray.cluster import daemons
daemons._WARN_S, daemons._GIVE_UP_S = 1.0, 3.0
def forbidden(pid):
    raise PermissionError
if "forbidden" in sys.argv:
    daemons.os.pidfd_open = forbidden
def last_words(error):
    print("last words:", type(error).__name__, error, flush=True)
    return 128 + error.number if isinstance(error, daemons.Terminated) else 1
child = subprocess.Popen(["sleep", "100"])
address = None if sys.argv[1] == "own" else ("127.0.0.1", int(sys.argv[1]))
watch = daemons.DaemonWatch({"raylet": child.pid} if address is None else {}, address, last_words)
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
with daemons.signals_end_in_order(watch):
    try:
        print(child.pid, flush=True)
        libc.pthread_mutex_lock(mutex)
    except daemons.Terminated:  # it was not there yet, and hangs while it ends
        libc.pthread_mutex_lock(mutex)
"""


def start(cluster: str, *arguments: str) -> tuple["subprocess.Popen[str]", int]:
    """The process, in a group of its own, and its daemon's id."""
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, cluster, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def end_of(process: "subprocess.Popen[str]") -> tuple[int, str]:
    assert process.stdout is not None
    code = process.wait(timeout=15)
    return code, process.stdout.readline()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_the_whole_group_ends_the_process_though_it_hangs(number: signal.Signals, code: int) -> None:
    process, _ = start("own")
    os.killpg(process.pid, number)
    assert end_of(process) == (code, f"last words: Terminated {number.name}\n")


@pytest.mark.parametrize("notified", [True, False])
def test_a_daemon_that_dies_is_named(notified: bool) -> None:
    """Also where a container forbids to be notified of it."""
    process, daemon = start("own", *([] if notified else ["forbidden"]))
    os.kill(daemon, signal.SIGKILL)
    words = f"last words: ClusterLost the Ray cluster of this run is gone: raylet (process {daemon}) has ended\n"
    assert end_of(process) == (1, words)


def test_the_head_of_others_may_come_back_but_not_stay_away() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        process, child = start(str(port))
        time.sleep(1.5)
        assert process.poll() is None
    time.sleep(1.5)
    with socket.create_server(("127.0.0.1", port)):
        time.sleep(3.5)
        assert process.poll() is None
    code, words = end_of(process)
    os.kill(child, signal.SIGKILL)
    assert code == 1
    assert f"the head of the Ray cluster at 127.0.0.1:{port} does not answer any more" in words
