"""The one interface for sending weights; which backend carries them is the platform's choice."""

from dataclasses import dataclass

from torch import nn
from vllm.distributed.weight_transfer.base import TrainerInitInfo, VLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from rlhf_ray.engines.weight_transfer.source import ModelWeights
from rlhf_ray.platform import transfer_backend


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
        self._engine = WeightTransferTrainerFactory.trainer_init(
            _init_info(group), client=client, source=ModelWeights(model, group.bucket_bytes)
        )

    def send(self) -> None:
        """One whole update of every engine."""
        self._engine.send_weights()


def _init_info(group: SyncGroup) -> TrainerInitInfo:
    world_size = 1 + group.workers
    backend = transfer_backend(group.same_devices)
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=group.bucket_bytes, rank=group.rank)
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
