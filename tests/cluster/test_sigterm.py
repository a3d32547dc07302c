import signal
import subprocess
import sys
import threading

import pytest

from rlhf_ray.cluster.session import Terminated, sigterm_raises


def test_sigterm_raises_in_the_main_thread() -> None:
    with pytest.raises(Terminated), sigterm_raises():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_sigterm_ends_the_process_at_once() -> None:
    script = """
import signal
from rlhf_ray.cluster.session import sigterm_raises
try:
    with sigterm_raises():
        signal.raise_signal(signal.SIGTERM)
finally:
    signal.raise_signal(signal.SIGTERM)
    print("still here")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


def test_other_threads_leave_the_handler_alone() -> None:
    seen = []

    def look() -> None:
        with sigterm_raises():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(10)
    assert seen == [signal.SIG_DFL]
