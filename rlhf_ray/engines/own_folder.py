"""A folder on a local disk that belongs to one process and goes with it, however that ends."""

import fcntl
import shutil
import tempfile
import weakref
from pathlib import Path


class OwnFolder:
    """A folder of this process alone. What killed processes left behind goes when the next one comes.

    Args:
        root: where it is made; it may have folders of other ranks, roles and runs.

    Attributes:
        path: of the folder.

    Raises:
        OSError: it can't be made.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        # One process at a time, so that no folder is taken for abandoned before it is locked.
        with (root / _LOCK).open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            _remove_abandoned(root)
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
            self._lock = (self.path / _LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def remove(self) -> None:
        """Remove it now."""
        self._remove()


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
