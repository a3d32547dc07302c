"""A `gloo` backend for vLLM's weight-transfer API, which itself ships none that works without a GPU.

Each tensor is one broadcast, and a bounded number of bytes is under way at a time: tensors leave from where they
are, and the engine loads one while the next arrive. An engine holds what is under way and what the layers that it is
loading have received.
Importing this module registers the backend.
"""

import socket
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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


def _join(host: str, port: int, rank: int, world_size: int, timeout_s: float) -> dist.ProcessGroupGloo:
    timeout = timedelta(seconds=timeout_s)
    if rank == 0:  # listen on this node's own address instead of on all, which is TCPStore's way
        listener = socket.create_server((host, port)).detach()
        store = TCPStore(host, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listener)
    else:
        store = TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    return dist.ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, timeout)


def _broadcasts(
    group: dist.ProcessGroupGloo, tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Broadcast named tensors from rank 0 and yield each, in order, when it is through.

    At most `bucket_bytes` are under way; a larger tensor goes alone. All ranks pass tensors of the same shapes.
    """
    under_way: deque[tuple[str, torch.Tensor, dist.Work]] = deque()
    held = 0

    def first() -> tuple[str, torch.Tensor]:
        nonlocal held
        name, tensor, work = under_way.popleft()
        work.wait()
        held -= tensor.nbytes
        return name, tensor

    for name, tensor in tensors:
        while under_way and held + tensor.nbytes > bucket_bytes:
            yield first()
        work = group.broadcast([tensor], dist.BroadcastOptions())  # type: ignore[attr-defined]
        under_way.append((name, tensor, work))
        held += tensor.nbytes
    while under_way:
        yield first()


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
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        # A head that is tied to the embedding receives nothing itself, so vLLM 0.32 would go on using the packed copy
        # that it made of the old embedding. The embedding has just been packed in the same way.
        layers = [layer for layer in self.model.modules() if isinstance(layer, VocabParallelEmbedding)]
        embeddings = {id(layer.weight): layer for layer in layers if not isinstance(layer, ParallelLMHead)}
        for layer in layers:
            if isinstance(layer, ParallelLMHead) and id(layer.weight) in embeddings:
                layer.cpu_linear = embeddings[id(layer.weight)].cpu_linear

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Receive and load. Without the base class's `torch.accelerator.synchronize`, which needs a GPU."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Load tensors as they arrive."""
        if self._group is None:
            raise RuntimeError(
                "weights were sent before this engine joined the transfer group: call init_transfer first"
            )
        fields = zip(update_info.names, update_info.dtypes, update_info.shapes, strict=True)
        empty = ((name, torch.empty(shape, dtype=getattr(torch, dtype))) for name, dtype, shape in fields)
        with _fewer_threads():
            self.model.load_weights(_broadcasts(self._group, empty, self._bucket_bytes))

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None


@contextmanager
def _fewer_threads() -> Iterator[None]:
    """Compute with one thread less, which leaves its core to the wire: threads that wait for one another lose more."""
    threads = torch.get_num_threads()
    torch._C.set_num_threads(max(1, threads - 1))  # vLLM makes torch.set_num_threads do nothing
    try:
        yield
    finally:
        torch._C.set_num_threads(threads)


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
            for _ in _broadcasts(self._group, self._announced(metadata), self._bucket_bytes):
                pass
            received.result(self._timeout_s)
        self.client.finish_weight_update()

    def _announced(self, metadata: list[ParamMeta]) -> Iterator[tuple[str, torch.Tensor]]:
        assert self.source is not None
        for meta, (name, tensor) in zip(metadata, self.source, strict=True):
            found = ParamMeta(name, tensor.dtype, tuple(tensor.shape))
            assert found == meta, f"weights came as {found}, announced as {meta}"
            yield name, tensor


class _one_thread(ThreadPoolExecutor):
    """A thread for the call that must run beside the collective. After an error it is left behind, not waited for:
    it may sit in a collective whose peer is gone."""

    def __init__(self) -> None:
        super().__init__(max_workers=1)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.shutdown(wait=kind is None)


if BACKEND not in WeightTransferEngineFactory._registry:  # a module can be imported under two names
    WeightTransferEngineFactory.register_engine(BACKEND, GlooWeightTransferEngine)
    WeightTransferTrainerFactory.register_engine(BACKEND, GlooTrainerWeightTransferEngine)
