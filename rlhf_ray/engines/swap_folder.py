"""Where a rank keeps on a local disk what is offloaded to it."""

import fcntl
import shutil
import socket
import tempfile
import weakref
from pathlib import Path

from deepspeed.ops.op_builder import AsyncIOBuilder


class SwapError(Exception):
    """Nothing can be offloaded to a disk here.

    Attributes:
        node: name of the machine.
        reason: what is missing, and what to do.
    """

    def __init__(self, node: str, reason: str) -> None:
        self.node, self.reason = node, reason
        super().__init__(f"can't offload to nvme on node {node}: {reason}")

    def __reduce__(self) -> tuple[type["SwapError"], tuple[str, str]]:
        return type(self), (self.node, self.reason)


class SwapFolder:
    """A folder of this process alone, which goes with it. What killed processes left behind goes when the next comes.

    Args:
        nvme_path: where it is made; it may have folders of other ranks, roles and runs.

    Raises:
        SwapError: it can't be made, or DeepSpeed can't read and write there.
    """

    def __init__(self, nvme_path: str) -> None:
        if not AsyncIOBuilder().is_compatible():
            raise SwapError(
                socket.gethostname(),
                "DeepSpeed needs libaio with its headers and a C++ compiler (apt-get install g++ libaio-dev); where "
                "they are elsewhere, set CFLAGS and LDFLAGS in placement.ROLE.env",
            )
        root = Path(nvme_path)
        try:
            root.mkdir(parents=True, exist_ok=True)
            # One process at a time, so that no folder is taken for abandoned before it is locked.
            with (root / _LOCK).open("w") as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)
                _remove_abandoned(root)
                self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
                self._lock = (self.path / _LOCK).open("w")
                fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise SwapError(socket.gethostname(), f"engine.nvme_path {nvme_path!r} can't be used: {error}") from error
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


_PREFIX = "rlhf-ray-"
_LOCK = "lock"


def _remove_abandoned(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}*"):
        try:
            with (folder / _LOCK).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its process may be removing it at this moment, which it does without waiting for its turn.
                shutil.rmtree(folder, ignore_errors=True)
        except (BlockingIOError, FileNotFoundError):
            continue  # its process lives, or has just removed it
