"""The process groups between the ranks of one role."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rlhf_ray.models.sequence_parallel import SequenceParallel
from rlhf_ray.platform import platform


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of a role meet.

    Attributes:
        rank, world_size: of this process in the role.
        host, port: of rank 0.
        timeout_s: how long any collective may take.
    """

    rank: int
    world_size: int
    host: str
    port: int
    timeout_s: float


def join_collectives(rendezvous: Rendezvous) -> None:
    """Join the role's process group through DeepSpeed, once per process."""
    os.environ.update(
        RANK=str(rendezvous.rank),
        WORLD_SIZE=str(rendezvous.world_size),
        LOCAL_RANK="0",  # Ray shows each rank only its own device
        MASTER_ADDR=rendezvous.host,
        MASTER_PORT=str(rendezvous.port),
        DS_ACCELERATOR=platform().device.type,
    )
    import deepspeed

    # A shared-memory all-reduce for CPU inference, compiled for half a minute at the first start; unused here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=platform().collectives,
        auto_mpi_discovery=False,
        timeout=timedelta(seconds=rendezvous.timeout_s),
        rank=rendezvous.rank,
        world_size=rendezvous.world_size,
    )


def share_sequences(ranks: int) -> SequenceParallel:
    """This rank among the `ranks` neighbours that share its packs; all ranks of the role call it.

    Raises:
        ValueError: `ranks` does not divide the number of ranks of the role.
    """
    # Without it a new group has torch's own limit, of half an hour, and not the one of the role.
    timeout = dist.group.WORLD._get_backend(platform().device).options._timeout  # type: ignore[union-attr]
    new_subgroups: Callable[..., tuple[dist.ProcessGroup, Any]] = dist.new_subgroups
    group, _ = new_subgroups(ranks, timeout=timeout)
    return SequenceParallel(group, ranks, dist.get_rank(group))
