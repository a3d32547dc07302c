"""A `gloo` backend for vLLM's weight-transfer API, which itself ships none that works without a GPU.

Both sides cut the list of tensors into the same buckets. The trainer copies one bucket while the one before is on
the wire; the engine loads one while the next arrives. The trainer holds two buckets at most, the engine as many as
the layer that it is loading spans, and one more.
Importing this module registers the backend: the engine's workers do so through `worker_extension_cls`.
"""

import math
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import ClassVar, Self

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

BACKEND = "gloo"
_ALIGNMENT = 16


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """What an engine's worker needs to join; `rank_offset` is the first rank of its engine."""

    host: str
    port: int
    rank_offset: int
    world_size: int
    bucket_bytes: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The tensors of one update, in the order they are sent."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """What the trainer needs to open the group; it is rank 0, the engines' workers follow."""

    backend: ClassVar[str] = BACKEND

    host: str
    port: int
    world_size: int
    bucket_bytes: int
    timeout_s: float


@dataclass(frozen=True)
class _Slot:
    meta: ParamMeta
    start: int
    size: int


def buckets_of(metadata: list[ParamMeta], bucket_bytes: int) -> list[tuple[int, list[_Slot]]]:
    """Cut tensors, in order, into buckets of at most `bucket_bytes`; a larger tensor has its own.

    Returns:
        Bytes of each bucket, and where each of its tensors stands in it.
    """
    buckets: list[tuple[int, list[_Slot]]] = []
    slots: list[_Slot] = []
    end = 0
    for meta in metadata:
        size = math.prod(meta.shape) * meta.dtype.itemsize
        if slots and end + size > bucket_bytes:
            buckets.append((end, slots))
            slots, end = [], 0
        slots.append(_Slot(meta, end, size))
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    if slots:
        buckets.append((end, slots))
    return buckets


def _join(host: str, port: int, rank: int, world_size: int, timeout_s: float) -> dist.ProcessGroupGloo:
    timeout = timedelta(seconds=timeout_s)
    if rank == 0:  # listen on this node's own address instead of on all, which is TCPStore's way
        listener = socket.create_server((host, port)).detach()
        store = TCPStore(host, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listener)
    else:
        store = TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    return dist.ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, timeout)


def _broadcast(group: dist.ProcessGroupGloo, buffer: torch.Tensor) -> dist.Work:
    return group.broadcast([buffer], dist.BroadcastOptions())  # type: ignore[attr-defined]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The receiving side, in each worker of a rollout engine."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _group: dist.ProcessGroupGloo | None = None
    _bucket_bytes: int

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the trainer's group."""
        rank = init_info.rank_offset + self.parallel_config.rank
        self._group = _join(init_info.host, init_info.port, rank, init_info.world_size, init_info.timeout_s)
        self._bucket_bytes = init_info.bucket_bytes

    def start_weight_update(self) -> None:
        """Give the parameters their checkpoint form back: on CPU they were repacked after loading."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Repack what arrived."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        # A head that is tied to the embedding receives nothing itself, so vLLM 0.32 would go on using the packed copy
        # that it made of the old embedding.
        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Receive and load. Without the base class's `torch.accelerator.synchronize`, which needs a GPU."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Load tensors as their buckets arrive."""
        if self._group is None:
            raise RuntimeError(
                "weights were sent before this engine joined the transfer group: call init_transfer first"
            )
        fields = zip(update_info.names, update_info.dtypes, update_info.shapes, strict=True)
        metadata = [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in fields]
        self.model.load_weights(self._arriving(self._group, metadata))

    def _arriving(self, group: dist.ProcessGroupGloo, metadata: list[ParamMeta]) -> Iterator[tuple[str, torch.Tensor]]:
        # Each bucket has a buffer of its own: the loader keeps tensors until their layer is complete.
        buckets = buckets_of(metadata, self._bucket_bytes)
        buffer = torch.empty(buckets[0][0], dtype=torch.uint8)
        work = _broadcast(group, buffer)
        for number, (_, slots) in enumerate(buckets):
            work.wait()
            arrived = buffer
            if number + 1 < len(buckets):
                buffer = torch.empty(buckets[number + 1][0], dtype=torch.uint8)
                work = _broadcast(group, buffer)
            for slot in slots:
                flat = arrived[slot.start : slot.start + slot.size].view(slot.meta.dtype)
                yield slot.meta.name, flat.view(slot.meta.shape)

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The sending side, on every rank of the trainer; only rank 0 sends."""

    init_info_cls = GlooTrainerInitInfo
    _group: dist.ProcessGroupGloo
    _bucket_bytes: int
    _timeout_s: float

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        """Open the group and have the engines join it."""
        assert source is not None, "gloo sends whole models: it needs a WeightSource"
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if not engine.is_sender:
            return engine
        engine._bucket_bytes, engine._timeout_s = init_info.bucket_bytes, init_info.timeout_s
        joining = GlooInitInfo(
            host=init_info.host,
            port=init_info.port,
            rank_offset=1,
            world_size=init_info.world_size,
            bucket_bytes=init_info.bucket_bytes,
            timeout_s=init_info.timeout_s,
        )
        with _one_thread() as thread:  # the engines wait for the group, so both sides must go at once
            engines_joined = thread.submit(client.init_weight_transfer_engine, asdict(joining))
            engine._group = _join(init_info.host, init_info.port, 0, init_info.world_size, init_info.timeout_s)
            engines_joined.result(init_info.timeout_s)
        return engine

    def send_weights(self) -> None:
        """One whole update. On other ranks than 0 it only takes part in gathering shards."""
        assert self.source is not None
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        metadata = self.source.metadata()
        update = GlooUpdateInfo(
            names=[meta.name for meta in metadata],
            dtypes=[str(meta.dtype).removeprefix("torch.") for meta in metadata],
            shapes=[list(meta.shape) for meta in metadata],
        )
        self.client.start_weight_update()
        with _one_thread() as thread:
            received = thread.submit(self.client.update_weights, asdict(update))
            self._send(metadata)
            received.result(self._timeout_s)
        self.client.finish_weight_update()

    def _send(self, metadata: list[ParamMeta]) -> None:
        assert self.source is not None
        buckets = buckets_of(metadata, self._bucket_bytes)
        largest = max(size for size, _ in buckets)
        buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(min(2, len(buckets)))]
        sending: list[dist.Work | None] = [None] * len(buffers)
        tensors = iter(self.source)
        for number, (size, slots) in enumerate(buckets):
            turn = number % len(buffers)
            if (earlier := sending[turn]) is not None:
                earlier.wait()
            buffer = buffers[turn][:size]
            for slot in slots:
                name, tensor = next(tensors)
                assert name == slot.meta.name, f"weights came as {name}, announced as {slot.meta.name}"
                place = buffer[slot.start : slot.start + slot.size].view(slot.meta.dtype)
                place.copy_(tensor.detach().reshape(-1))
            sending[turn] = _broadcast(self._group, buffer)
        for _ in tensors:
            raise AssertionError("the source yields more tensors than its metadata announces")
        for work in sending:
            if work is not None:
                work.wait()


class _one_thread(ThreadPoolExecutor):
    """A thread for the call that must run beside the collective. After an error it is left behind, not waited for:
    it may sit in a collective whose peer is gone."""

    def __init__(self) -> None:
        super().__init__(max_workers=1)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.shutdown(wait=kind is None)


class WorkerExtension:
    """Named by `worker_extension_cls`, so that each worker of an engine imports this module."""


if BACKEND not in WeightTransferEngineFactory._registry:  # a module can be imported under two names
    WeightTransferEngineFactory.register_engine(BACKEND, GlooWeightTransferEngine)
    WeightTransferTrainerFactory.register_engine(BACKEND, GlooTrainerWeightTransferEngine)
