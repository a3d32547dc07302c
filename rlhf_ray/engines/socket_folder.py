"""Where the processes of a vLLM engine have their unix sockets, which vLLM leaves in /tmp when they are killed."""

import os
import tempfile
from pathlib import Path

from rlhf_ray.engines.own_folder import OwnFolder

_LONGEST = 107
"""Bytes of the path of a unix socket."""
_NAME = len("/rlhf-ray-12345678") + len("/01234567-89ab-cdef-0123-456789abcdef")
"""Bytes that a folder's and vLLM's socket's name add to its root."""


def socket_folder() -> OwnFolder:
    """A folder for the sockets of one engine, whose path leaves room for their names."""
    # Of this user: others can't open a file of somebody else's in the folder for temporary files.
    roots = [Path(folder) / f"rlhf-ray-{os.getuid()}" for folder in (tempfile.gettempdir(), "/tmp")]
    return OwnFolder(next((root for root in roots if len(os.fsencode(root)) + _NAME <= _LONGEST), roots[-1]))
