"""Where a rank keeps on a local disk what is offloaded to it."""

import socket
from pathlib import Path

from deepspeed.ops.op_builder import AsyncIOBuilder

from rlhf_ray.engines.own_folder import OwnFolder


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


def swap_folder(nvme_path: str) -> OwnFolder:
    """A folder that DeepSpeed can use.

    Args:
        nvme_path: where it is made; it may have folders of other ranks, roles and runs.

    Raises:
        SwapError: it can't be made, or DeepSpeed can't read and write there.
    """
    if not AsyncIOBuilder().is_compatible():
        raise SwapError(
            socket.gethostname(),
            "DeepSpeed needs libaio with its headers and a C++ compiler (apt-get install g++ libaio-dev); where "
            "they are elsewhere, set CFLAGS and LDFLAGS in placement.ROLE.env",
        )
    try:
        return OwnFolder(Path(nvme_path))
    except OSError as error:
        raise SwapError(socket.gethostname(), f"engine.nvme_path {nvme_path!r} can't be used: {error}") from error
