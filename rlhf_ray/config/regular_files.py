"""Reading files that somebody names: regular ones alone, since a pipe never ends and a device may have no end."""

import os
import stat
from pathlib import Path


def read_regular(path: Path, most: int) -> bytes:
    """The content of a file, at most `most` + 1 bytes of it, so that one that is too large is seen to be.

    Raises:
        OSError: it is no regular file, or can't be read.
    """
    try:
        # Opening a FIFO would otherwise wait for who writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise OSError(22, "no file can have this name", str(path)) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(22, "it is a folder" if stat.S_ISDIR(mode) else "it is no regular file", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most + 1)
    finally:
        os.close(descriptor)
