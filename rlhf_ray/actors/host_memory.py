"""Host memory that processes hold."""

import ctypes
from pathlib import Path

import psutil

_ALL_ARENAS = b"arena.4096.purge"


def held_bytes(process: psutil.Process) -> int:
    """Resident memory of a process without pages that it has freed and that the kernel may take at any time.

    Raises:
        psutil.NoSuchProcess: it has ended.
    """
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except OSError:  # it has ended, or its kernel doesn't tell
        return int(process.memory_info().rss)
    lines = dict(line.split(":", 1) for line in text.splitlines()[1:])
    return (int(lines["Rss"].split()[0]) - int(lines["LazyFree"].split()[0])) * 1024


def host_bytes() -> int:
    """What this process holds and those that it started; pages that they share count for each."""
    own = psutil.Process()
    total = 0
    for process in [own, *own.children(recursive=True)]:
        try:
            total += held_bytes(process)
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
    return total


def give_back() -> None:
    """Have the allocator, where it is jemalloc, give back all that this process has freed."""
    purge = getattr(ctypes.CDLL(None), "mallctl", None)
    if purge is not None:
        nothing = ctypes.c_size_t(0)
        purge(_ALL_ARENAS, None, None, None, nothing)
