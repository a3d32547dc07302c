"""Host memory that processes hold."""

import ctypes
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

_PURGE_ALL = b"arena.4096.purge"  # jemalloc's word for: of all arenas


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


def sum_of_held_bytes(processes: Iterable[psutil.Process]) -> int:
    """Sum of `held_bytes` over processes. One that has ended counts 0; a page that several processes map counts for
    each of them."""
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it ended meanwhile
            total += held_bytes(process)
    return total


def host_bytes() -> int:
    """Bytes of host memory that this process and its child processes hold."""
    own = psutil.Process()
    return sum_of_held_bytes([own, *own.children(recursive=True)])


def give_back() -> None:
    """Have the allocator, where it is jemalloc, give back all that this process has freed.

    Raises:
        OSError: it refused.
    """
    purge = getattr(ctypes.CDLL(None), "mallctl", None)
    if purge is not None:
        error = purge(_PURGE_ALL, None, None, None, ctypes.c_size_t(0))
        if error:
            raise OSError(error, f"jemalloc refused {_PURGE_ALL.decode()}")
