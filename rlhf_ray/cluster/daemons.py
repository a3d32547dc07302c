"""What becomes of a process whose Ray cluster goes away under it.

Ray's own calls wait a minute for a cluster that is gone and then end the process with a stack of Ray's. That is what
happens when a signal goes to the whole process group or control group (`timeout`, Slurm, systemd): it ends Ray's
daemons as well, and the process that ends in order waits for them in vain. Such a wait is inside of Ray and can't be
interrupted, so a thread watches, has the last words said, and ends the process.
"""

import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger("rlhf_ray")

LastWords = Callable[[BaseException], int]
"""Says why the process ends, and gives its exit code. Must not need the cluster."""

_LOOK_EVERY_S = 1.0
_WARN_S = 8.0
"""After so long a cluster that others started is said to be out of reach."""
_GIVE_UP_S = 50.0
"""After so long it is lost; Ray would end the process after a minute. Its head may come back until then."""


class Terminated(KeyboardInterrupt):
    """A signal came that ends a job in order, as schedulers and terminals send it.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


class ClusterLost(Exception):
    """The Ray cluster went away during a run."""


class DaemonWatch:
    """A thread that ends this process when its cluster is gone.

    Args:
        daemons: name and process id of those that this process started.
        address: of the cluster's head, for clusters that others started.
    """

    def __init__(self, daemons: Mapping[str, int], address: tuple[str, int] | None, last_words: LastWords) -> None:
        self._names: dict[int, str] = {}
        self._polled: dict[int, str] = {}
        for name, pid in daemons.items():
            try:
                self._names[os.pidfd_open(pid)] = f"{name} (process {pid})"
            except OSError:  # some containers forbid it
                self._polled[pid] = f"{name} (process {pid})"
        self._address, self._last_words = address, last_words
        self._wake, self.wakeup_fd = os.pipe()
        for end in (self._wake, self.wakeup_fd):
            os.set_blocking(end, False)
        self._stopping: BaseException | None = None
        self._unreachable_s: float | None = None
        self._warned = self._over = False
        self._thread = threading.Thread(target=self._run, name="daemons", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The process is about to leave the cluster."""
        self._over = True
        os.write(self.wakeup_fd, b"\0")
        self._thread.join()
        for descriptor in (*self._names, self._wake, self.wakeup_fd):
            os.close(descriptor)

    def _run(self) -> None:
        while not self._over:
            ended = self._wait(_LOOK_EVERY_S)
            if self._over:
                return
            if ended:
                # A signal that ended the daemon may be on its way to this process too.
                self._wait_for_signal(0.3)
                self._end(f"{ended} has ended")
            elif self._address is not None:
                self._look_at_head(self._address)

    def _wait(self, timeout_s: float) -> str | None:
        """The daemon that has ended, None if none has; signals wake as well."""
        ready, _, _ = select.select([*self._names, self._wake], [], [], timeout_s)
        if self._wake in ready:
            self._note_signals()
        ended = [self._names[fd] for fd in ready if fd != self._wake]
        ended += [name for pid, name in self._polled.items() if _is_gone(pid)]
        return ended[0] if ended else None

    def _wait_for_signal(self, timeout_s: float) -> None:
        if self._stopping is None and select.select([self._wake], [], [], timeout_s)[0]:
            self._note_signals()

    def _note_signals(self) -> None:
        for number in os.read(self._wake, 64):
            if number == signal.SIGINT:
                self._stopping = KeyboardInterrupt()
            elif number in (signal.SIGTERM, signal.SIGHUP):
                self._stopping = Terminated(number)

    def _look_at_head(self, address: tuple[str, int]) -> None:
        try:
            socket.create_connection(address, timeout=5).close()
        except OSError as error:
            now = time.monotonic()
            since_s = self._unreachable_s = now if self._unreachable_s is None else self._unreachable_s
            where = f"the head of the Ray cluster at {address[0]}:{address[1]}"
            if self._stopping is not None or now - since_s >= _GIVE_UP_S:
                self._end(f"{where} does not answer any more ({error})")
            if now - since_s >= _WARN_S and not self._warned:
                self._warned = True
                logger.warning(
                    "%s has not answered for %.0f s (%s); the run ends if it stays away", where, _WARN_S, error
                )
        else:
            self._unreachable_s, self._warned = None, False

    def _end(self, how: str) -> None:
        error = self._stopping or ClusterLost(f"the Ray cluster of this run is gone: {how}")
        code = 1
        with suppress(Exception):  # whatever happens to the words, the process ends
            code = self._last_words(error)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


def _is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


@contextmanager
def signals_end_in_order(watch: DaemonWatch | None = None) -> Iterator[None]:
    """End in order at SIGTERM and at SIGHUP, as at Ctrl-C; Ray's own handler, which `ray.init` installs for the first,
    aborts the process. A second one ends it at once. A signal that is ignored (`nohup`) stays so.

    Args:
        watch: gets to know of signals even while the process is inside of Ray.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated(number)

    ours = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = -1
    for number in ours:
        signal.signal(number, end)
    if watch is not None:
        before = signal.set_wakeup_fd(watch.wakeup_fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        if watch is not None:
            signal.set_wakeup_fd(before)
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
