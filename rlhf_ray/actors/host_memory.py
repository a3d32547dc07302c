"""Host memory that processes hold."""

from pathlib import Path

import psutil


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
