"""Memory of a process as the kernel counts it; Linux only."""

from pathlib import Path

# Tensors of their own pages, which go back to the kernel when they are freed: then memory in use is what is counted.
EXACT = {"LD_PRELOAD": "", "MALLOC_CONF": "", "MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)}
"""Environment of a process that is measured."""


def in_use() -> int:
    """Bytes that this process has in memory."""
    return _of_status("VmRSS")


def most_in_use() -> int:
    """The most bytes that it had since `forget_most`."""
    return _of_status("VmHWM")


def forget_most() -> None:
    """Begin anew to look for the most bytes in use."""
    Path("/proc/self/clear_refs").write_text("5")


def _of_status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: this benchmark needs Linux")
