import signal
import subprocess
import sys
import threading

import pytest

from rlhf_ray.cluster.daemons import Terminated, signals_end_in_order


def test_signals_end_in_order_in_the_main_thread() -> None:
    with pytest.raises(Terminated), signals_end_in_order():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_sigterm_ends_the_process_at_once() -> None:
    script = """
import signal
from rlhf_ray.cluster.daemons import signals_end_in_order
try:
    with signals_end_in_order():
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
        with signals_end_in_order():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(10)
    assert seen == [signal.SIG_DFL]


def test_a_hangup_ends_in_order_too_unless_it_is_ignored() -> None:
    with pytest.raises(Terminated, match="SIGHUP"), signals_end_in_order():
        signal.raise_signal(signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        with signals_end_in_order():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
