"""What is sent to vLLM's own classes on a GPU, held against them without one.

The GPU itself is all that is replaced: memory that is allocated there, its handles, its identity.
"""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vllm.distributed.weight_transfer import nccl_engine, packed_tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from rlhf_ray.actors import weight_sync
from rlhf_ray.actors.weight_sync import EngineClient
from rlhf_ray.config.roles import Level
from rlhf_ray.config.rollout import RolloutEngine as EngineSection
from rlhf_ray.data.requests import PromptRequest
from rlhf_ray.data.trajectory import FinishReason
from rlhf_ray.engines import rollout
from rlhf_ray.engines.held_weights import HeldWeights
from rlhf_ray.engines.rollout_setup import RolloutSetup
from rlhf_ray.engines.weight_transfer import gloo
from rlhf_ray.engines.weight_transfer.sender import SyncGroup, init_info
from rlhf_ray.platform import TransferBackend

BACKENDS: tuple[TransferBackend, ...] = ("nccl", "ipc", "gloo")
ENGINES, WORKERS = 3, 2
INSECURE = "VLLM_ALLOW_INSECURE_SERIALIZATION"

# As `torch.multiprocessing.reductions.reduce_tensor` gives them for memory of a GPU.
HANDLE = (
    torch.Tensor, torch.Size([64]), (1,), 0, torch.UntypedStorage, torch.uint8, 0, b"handle" * 11, 64, 0, b"counter", 0,
    b"event" * 13, True,
)  # fmt: skip


class Weights(WeightSource):
    """A large embedding among small weights."""

    def __init__(self) -> None:
        self.model = nn.ModuleDict(
            {"norm": nn.LayerNorm(8), "embedding": nn.Embedding(512, 8), "head": nn.Linear(8, 8)}
        )

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor.detach()) for name, tensor in self.model.named_parameters())


class Engine:
    """Stands where a rollout actor does, and keeps what it is sent."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> None:
            self.calls.append((method, *arguments))

        return SimpleNamespace(remote=remote)

    def given(self, method: str) -> list[Any]:
        return [arguments[0] for name, *arguments in self.calls if name == method]


@pytest.fixture
def engines() -> list[Engine]:
    return [Engine() for _ in range(ENGINES)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Just so much of a GPU that vLLM's trainer side runs: its memory is the host's, its collectives go nowhere."""
    empty = torch.empty
    monkeypatch.setattr(weight_sync, "wait_all", lambda refs, *_: list(refs))
    monkeypatch.setattr(torch, "empty", lambda *sizes, device=None, **options: empty(*sizes, **options))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(packed_tensor, "reduce_tensor", lambda _: (None, HANDLE))
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda _: "a communicator")
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", lambda iterator, **_: list(iterator))
    monkeypatch.setattr(gloo, "_join", lambda *_: "a group")
    monkeypatch.setattr(gloo, "_broadcasts", lambda _, tensors, __: list(tensors))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process's, for the test alone."""
    own = {name: value for name, value in os.environ.items() if name != INSECURE}
    monkeypatch.setattr(os, "environ", own)
    return own


def sender(backend: TransferBackend, engines: list[Engine], bucket_bytes: int = 4096) -> Any:
    weights = Weights()
    group = SyncGroup(0, "10.0.0.1", 4000, ENGINES * WORKERS, bucket_bytes, 30.0, same_devices=backend == "ipc")
    info = init_info(group, backend, weights.metadata())
    client = EngineClient(engines, WORKERS, 30.0)
    client.version = 9
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=weights)


def worker_side(backend: TransferBackend) -> Any:
    """The class of the receiving side, as vLLM finds it by its name."""
    entry = WeightTransferEngineFactory._registry[backend]
    return entry() if not isinstance(entry, type) else entry


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_engine_can_read_what_it_is_told_at_the_start(
    backend: TransferBackend, engines: list[Engine], gpu: None
) -> None:
    sender(backend, engines)
    told = [worker_side(backend).init_info_cls(**engine.given("init_transfer")[0]) for engine in engines]
    if backend == "ipc":
        assert all(info.packed for info in told)
    else:
        ranks = [info.rank_offset + worker for info in told for worker in range(WORKERS)]
        assert ranks == list(range(1, told[0].world_size)), "each worker has a rank of its own, after the trainer's"


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_engine_can_read_the_updates_and_gets_all_weights_once(
    backend: TransferBackend, engines: list[Engine], gpu: None
) -> None:
    sender(backend, engines).send_weights()
    wanted = [(meta.name, list(meta.shape)) for meta in Weights().metadata()]
    for engine in engines:
        updates = [worker_side(backend).update_info_cls(**given) for given in engine.given("update")]
        found = [pair for update in updates for pair in zip(update.names, update.shapes, strict=True)]
        assert found == wanted
        assert [name for name, *_ in engine.calls][1] == "start_update"
        assert engine.calls[-1] == ("finish_update", 9)


def test_a_packed_ipc_buffer_holds_the_largest_tensor_and_no_more_than_the_model(
    engines: list[Engine], gpu: None
) -> None:
    sizes = [tensor.nbytes for _, tensor in Weights()]
    assert sender("ipc", engines, bucket_bytes=64).packed_buffer_size_bytes == max(sizes)
    assert sender("ipc", engines, bucket_bytes=2**30).packed_buffer_size_bytes == sum(sizes)
    small = sender("ipc", engines, bucket_bytes=64)
    small.send_weights()
    small.packed_buffer_size_bytes = 64
    with pytest.raises(ValueError, match="exceeds buffer_size_bytes=64"):  # what it would be without
        small.send_weights()


def on_the_wire(update: dict[str, Any]) -> Any:
    """What arrives in the engine's own process of a call of `collective_rpc`, as vLLM's core client sends it."""
    message = (0, 1, "collective_rpc", ("update_weights", None, (), {"update_info": update}))
    arrived = MsgpackDecoder().decode(MsgpackEncoder().encode(message))
    return arrived[3][3]["update_info"]


def updates_of(backend: TransferBackend, engines: list[Engine]) -> list[dict[str, Any]]:
    sender(backend, engines).send_weights()
    return engines[0].given("update")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_gets_to_the_engines_process_with_the_settings_that_the_engine_is_started_with(
    backend: TransferBackend,
    engines: list[Engine],
    gpu: None,
    environment: dict[str, str],
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollout, "transfer_backend", lambda _: backend)
    setup = RolloutSetup(str(tiny_model_dir), EngineSection(), "bfloat16", 1, seed=0, beside_policy=backend == "ipc")
    rollout._engine_args(setup, None)
    for update in updates_of(backend, engines):
        arrived = on_the_wire(update)
        worker_side(backend).update_info_cls(**arrived)
        assert arrived["names"] == update["names"]
        if backend == "ipc":
            as_sent = [list(part) if isinstance(part, tuple) else part for part in HANDLE]
            assert list(arrived["ipc_handles"]["GPU-1"]) == as_sent


def refused(update: dict[str, Any]) -> bool:
    try:
        on_the_wire(update)
    except TypeError as error:
        return INSECURE in str(error)
    return False


def test_pickles_are_allowed_for_the_backends_alone_that_need_them(
    gpu: None, environment: dict[str, str], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for backend in BACKENDS:
        environment.pop(INSECURE, None)
        updates = updates_of(backend, [Engine() for _ in range(ENGINES)])
        needed = any(refused(update) for update in updates)
        monkeypatch.setattr(rollout, "transfer_backend", lambda _, backend=backend: backend)
        rollout._engine_args(RolloutSetup(str(tiny_model_dir), EngineSection(), "bfloat16", 1, seed=0), None)
        assert (INSECURE in environment) == needed, backend


class Sleeper(Executor):
    """vLLM's account of what sleeps, over workers that do nothing."""

    def __init__(self) -> None:
        self.sleeping_tags: set[str] = set()
        self.levels: list[int] = []

    def collective_rpc(self, method: str, *_: Any, kwargs: dict[str, Any], **__: Any) -> None:  # type: ignore[override]
        if method == "sleep":
            self.levels.append(kwargs["level"])


Sleeper.__abstractmethods__ = frozenset()


class Core:
    """Where `AsyncLLM` is, over vLLM's own engine core and executor."""

    errored = False

    def __init__(self) -> None:
        self.executor = Sleeper()
        self.generating = True
        self._core = SimpleNamespace(
            model_executor=self.executor,
            pause_scheduler=self._pause,
            resume_scheduler=lambda: setattr(self, "generating", True),
        )

    def _pause(self, **_: Any) -> None:
        self.generating = False

    async def sleep(self, level: int) -> None:
        EngineCore.sleep(self._core, level)  # type: ignore[arg-type]

    async def wake_up(self, tags: list[str] | None) -> bool:
        return EngineCore.wake_up(self._core, tags)  # type: ignore[arg-type]


@settings(deadline=None)
@given(levels=st.lists(st.sampled_from(list(Level)), max_size=8), sleep=st.sampled_from([1, 2]))
def test_an_engine_on_a_gpu_sleeps_and_wakes_as_far_as_it_is_told(levels: list[Level], sleep: int) -> None:
    core = Core()
    engine: Any = object.__new__(rollout.RolloutEngine)
    engine._engine, engine._sleep, engine.held = core, sleep, HeldWeights(keeps=sleep == 1)
    engine.held.has(3)
    asleep = {Level.OUT: {"weights", "kv_cache"}, Level.WEIGHTS: {"kv_cache"}, Level.FULL: set[str]()}

    async def go() -> None:
        for level in levels:
            await engine.move(level)
            assert core.executor.sleeping_tags == asleep[level]
            assert core.generating == (level == Level.FULL)
            assert (engine.held.version is None) == (2 in core.executor.levels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "platform", lambda: SimpleNamespace(device=torch.device("cuda", 0)))
        asyncio.run(go())


@pytest.mark.parametrize("reason", ["stop", "length", "abort", "error"])
def test_a_response_that_something_cut_short_is_no_sample(reason: str) -> None:
    prompt = PromptRequest("a", 2, 0, np.array([5, 6], np.int32))
    logprobs: Any = [{7: Logprob(-0.5)}, {8: Logprob(-0.25)}]
    output = CompletionOutput(0, "", [7, 8], None, logprobs, finish_reason=reason)
    if reason in get_args(FinishReason):
        assert rollout._trajectory(prompt, output).finish_reason == reason
    else:
        with pytest.raises(RuntimeError, match=f"ended the response to a#2 after 2 tokens with {reason!r}"):
            rollout._trajectory(prompt, output)
