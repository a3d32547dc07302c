"""The one interface for sending weights; which backend carries them is the platform's choice."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, VLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from rlhf_ray.engines.weight_transfer.source import ModelWeights
from rlhf_ray.platform import TransferBackend, transfer_backend


@dataclass(frozen=True)
class SyncGroup:
    """Where trainer and engine workers meet.

    Attributes:
        rank: of this trainer process; rank 0 sends.
        host, port: of the sender.
        workers: of all engines together.
        bucket_bytes: most weights in flight at a time.
        timeout_s: how long a send may take.
        same_devices: each worker sits on the device of a trainer rank.
    """

    rank: int
    host: str
    port: int
    workers: int
    bucket_bytes: int
    timeout_s: float
    same_devices: bool


class WeightSender:
    """Sends a model's weights to all engines. Every trainer rank builds one and calls `send` together."""

    def __init__(self, model: nn.Module, group: SyncGroup, client: VLLMWeightSyncClient) -> None:
        source = ModelWeights(model, group.bucket_bytes)
        info = init_info(group, transfer_backend(group.same_devices), source.metadata())
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)

    def send(self) -> None:
        """One whole update of every engine."""
        self._engine.send_weights()


def init_info(group: SyncGroup, backend: TransferBackend, weights: Sequence[ParamMeta]) -> TrainerInitInfo:
    """What a backend of vLLM's is told of the group and the weights that will be sent."""
    world_size = 1 + group.workers
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        # This backend's buffer takes no tensor larger than itself, where the others let one go alone, and it is made as
        # large as it is said to be, whatever is sent.
        sizes = [math.prod(weight.shape) * weight.dtype.itemsize for weight in weights]
        size = min(max(group.bucket_bytes, *sizes), sum(sizes))
        return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=size, rank=group.rank)
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(
            master_address=group.host,
            master_port=group.port,
            world_size=world_size,
            packed_buffer_size_bytes=group.bucket_bytes,
            rank=group.rank,
        )
    from rlhf_ray.engines.weight_transfer.gloo import GlooTrainerInitInfo

    return GlooTrainerInitInfo(
        host=group.host,
        port=group.port,
        world_size=world_size,
        bucket_bytes=group.bucket_bytes,
        timeout_s=group.timeout_s,
        rank=group.rank,
    )
