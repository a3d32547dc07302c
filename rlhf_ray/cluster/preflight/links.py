"""How fast a collective is between nodes. `LinkProbe` travels by value, as `NodeProbe` does."""

import socket
import time
from datetime import timedelta

_FIRST = 2**20
_LARGEST = 256 * 2**20
_AIM_S = 0.5


class LinkProbe:
    """One process of a group that has one on each node."""

    def __init__(self) -> None:
        import torch.distributed  # noqa: F401  takes seconds, which pass while other checks are made

    def address(self, host: str) -> tuple[str, int]:
        """A free port of this node to meet at."""
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, int(probe.getsockname()[1])

    def broadcast(
        self, backend: str, rank: int, size: int, own: str, host: str, port: int, timeout_s: float
    ) -> tuple[int, float]:
        """Join a group of `size` processes, as the ranks of a role do, and take part in a broadcast from rank 0.

        Args:
            own: address of this node.
            host, port: of rank 0.

        Returns:
            Bytes that were sent, and seconds until they were here. There are as many bytes as the slowest node gets in
            about half a second.
        """
        import torch
        import torch.distributed as dist

        from rlhf_ray.engines.interfaces import use_interface_of

        use_interface_of(own)
        device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
        limit = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, f"tcp://{host}:{port}", limit, size, rank)
        try:
            _timed(torch.zeros(_FIRST, dtype=torch.uint8, device=device))  # opens the connections
            slowest = torch.tensor(_timed(torch.zeros(_FIRST, dtype=torch.uint8, device=device)), device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            amount = int(min(_LARGEST, max(_FIRST, _FIRST * _AIM_S / float(slowest))))
            return amount, _timed(torch.zeros(amount, dtype=torch.uint8, device=device))
        finally:
            dist.destroy_process_group()


def _timed(tensor) -> float:
    import torch
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    dist.broadcast(tensor, 0)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
