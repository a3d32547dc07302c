"""One vLLM engine: prompts in, trajectories out, new weights in between."""

import asyncio
import os
import signal
import tempfile
from collections.abc import Coroutine, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar, get_args

from vllm import AsyncEngineArgs, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.config.lora import MaxLoRARanks
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from rlhf_ray.config.roles import Level
from rlhf_ray.config.rollout import Sampling
from rlhf_ray.data.requests import PromptRequest
from rlhf_ray.data.trajectory import Trajectory
from rlhf_ray.engines.engine_metrics import EngineLoad, stat_loggers
from rlhf_ray.engines.held_weights import HeldWeights
from rlhf_ray.engines.own_folder import OwnFolder
from rlhf_ray.engines.rollout_setup import EngineNode, RolloutSetup
from rlhf_ray.engines.socket_folder import socket_folder
from rlhf_ray.engines.vocabulary_mask import TOKEN_IDS, TOKENS_ONLY
from rlhf_ray.models.heads import count_ids, load_config, load_tokenizer
from rlhf_ray.models.lora import Adapter
from rlhf_ray.platform import platform, transfer_backend

_T = TypeVar("_T")

_LOOK_S = 0.5
"""How often to look whether the engine's own process lives, while its answer is awaited."""


class RolloutEngine:
    """vLLM's asynchronous engine with continuous batching. Start it inside an asyncio event loop.

    Attributes:
        queued: requests that have reached the engine, refused ones too; its owner may set it back.
        load: requests that run and wait.
        held: which weights it has. It generates with none others.
    """

    def __init__(self, setup: RolloutSetup, node: EngineNode | None = None) -> None:
        self.load = EngineLoad()
        self._sockets = _own_sockets()
        self._engine = AsyncLLM.from_engine_args(_engine_args(setup, node), stat_loggers=stat_loggers(self.load))
        self._adapter: LoRARequest | None = None
        self._sleep = setup.sleep
        self.held = HeldWeights(keeps=setup.sleep != 2)
        self._requests = 0
        self._ending = False
        self.queued = 0

    async def generate(self, prompts: Sequence[PromptRequest], sampling: Sampling) -> list[Trajectory]:
        """One response to each prompt, in order.

        Raises:
            WeightsMissing: it has no weights.
        """
        return list(await asyncio.gather(*(self._sample(prompt, sampling) for prompt in prompts)))

    async def _sample(self, prompt: PromptRequest, sampling: Sampling) -> Trajectory:
        self._requests += 1
        request_id = f"{self._requests}:{prompt.uid}:{prompt.sample_index}"
        prompt_tokens = TokensPrompt(prompt_token_ids=prompt.tokens.tolist())
        try:
            self.held.check_queueing()
            answers = await self._engine.add_request(
                request_id, prompt_tokens, _sampling_params(sampling, prompt.seed), lora_request=self._adapter
            )
        finally:
            self.queued += 1  # also when it was refused: others wait until all have come
        output = await answers.get()
        while not output.finished:
            output = await answers.get()
        assert isinstance(output, RequestOutput)
        return _trajectory(prompt, output.outputs[0])

    async def pause(self) -> None:
        """Hold all requests where they are and forget cached keys and values."""
        # AsyncLLM's own pause_generation also sleeps for 20 ms, to let aborted requests answer first.
        await self._answer(self._engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=True))

    async def resume(self) -> None:
        """Go on with held requests; an engine that is not on its devices as a whole does so when it comes back.

        Raises:
            WeightsMissing: it has no weights.
        """
        self.held.check_generating()
        if self.held.level == Level.FULL:
            await self._answer(self._engine.resume_generation())

    async def move(self, level: Level) -> None:
        """Leave the device, or come back to it, as far as `level` says. No request may be under way.

        vLLM has no sleep mode on CPU, where an engine holds its requests, forgets cached keys and values, and loses its
        weights where a GPU would.
        """
        on_cpu = platform().device.type == "cpu"
        if level < self.held.level:
            lost = self.held.moved(Level.OUT)
            if not on_cpu:
                await self._answer(self._engine.sleep(self._sleep))
            else:
                await self.pause()
                if lost:
                    await self._answer(self._engine.collective_rpc("lose_weights"))
        if level > self.held.level:
            if not on_cpu:
                await self._answer(self._engine.wake_up(["weights"] if level == Level.WEIGHTS else None))
            elif level == Level.FULL:
                await self._answer(self._engine.resume_generation())
            self.held.moved(level)

    async def init_transfer(self, init_info: dict[str, Any]) -> None:
        """Join the trainer's weight-transfer group."""
        request = WeightTransferInitRequest(init_info=init_info)
        await self._answer(self._engine.init_weight_transfer_engine(request))

    async def start_update(self) -> None:
        """Make ready for new weights; until all have come the engine has none.

        Raises:
            WeightsMissing: its memory for weights is not on the device.
        """
        self.held.arriving()
        await self._answer(self._engine.start_weight_update())

    async def update(self, update_info: dict[str, Any]) -> None:
        """Receive weights. After a failure the engine is half loaded, and has none."""
        try:
            await self._answer(self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info)))
        except BaseException:
            self.held.lost("its last weight sync failed half-way")
            raise

    async def finish_update(self, version: int) -> None:
        """Make the new weights the engine's."""
        await self._answer(self._engine.finish_weight_update(str(version)))
        self.held.has(version)

    async def load_adapter(self, adapter: Adapter) -> None:
        """Take an adapter in place of the one before. vLLM reads it from a folder, which need not be shared.

        Raises:
            WeightsMissing: there is no base model to apply it to.
        """
        self.held.check_generating()
        with tempfile.TemporaryDirectory(prefix="rlhf-ray-adapter-") as folder:
            adapter.write(Path(folder))
            replace = LoRARequest("policy", 1, folder, load_inplace=True)
            if not await self._answer(self._engine.add_lora(replace)):
                raise RuntimeError("vLLM did not load the policy's adapter and gives no reason")
        self._adapter = LoRARequest("policy", 1, folder)  # it is loaded: the folder, which is gone, is not read again

    async def set_version(self, version: int) -> None:
        """Name the weights in use."""
        await self._answer(self._engine.update_weight_version(str(version)))
        self.held.has(version)

    async def version(self) -> int | None:
        """Version of the weights, in the words of vLLM; None where it has none."""
        return None if self.held.version is None else int(await self._answer(self._engine.get_weight_version()))

    async def _answer(self, call: Coroutine[Any, Any, _T]) -> _T:
        """What the engine's own process answers.

        Raises:
            EngineDeadError: it died. vLLM 0.32 tells that to requests alone; its other calls would wait for ever.
        """
        answer = asyncio.ensure_future(call)
        while not answer.done():
            await asyncio.wait([answer], timeout=_LOOK_S)
            if self._engine.errored and not answer.done():
                answer.cancel()
                raise EngineDeadError()
        return answer.result()

    def find_lost_process(self) -> str | None:
        """The process of the engine that has died, if one has; vLLM tells it only to those who ask the engine next."""
        if self._ending:
            return None
        resources = self._engine.engine_core.resources
        died = _first_dead(resources.engine_manager.processes, "vLLM's engine process")
        if died is None and self._engine.errored:
            return "vLLM's engine says that it is dead; one of its workers may have died"
        return died

    def shutdown(self) -> None:
        """End the engine's processes."""
        self._ending = True
        self._engine.shutdown()
        self._sockets.remove()


class RolloutFollower:
    """Workers of an engine that another process leads. They do what that one says."""

    def __init__(self, setup: RolloutSetup, node: EngineNode) -> None:
        self._sockets = _own_sockets()
        config = _engine_args(setup, node).create_engine_config(UsageContext.ENGINE_CONTEXT, headless=True)
        self._executor = MultiprocExecutor(config, monitor_workers=False)
        self._ending = False

    def find_lost_process(self) -> str | None:
        """The worker that has died, if one has."""
        if self._ending:
            return None
        return _first_dead([worker.proc for worker in self._executor.workers], "vLLM's worker process")

    def shutdown(self) -> None:
        """End the workers."""
        self._ending = True
        self._executor.shutdown()
        self._sockets.remove()


def _own_sockets() -> OwnFolder:
    folder = socket_folder()
    os.environ["VLLM_RPC_BASE_PATH"] = str(folder.path)
    return folder


def _first_dead(processes: Sequence[BaseProcess], what: str) -> str | None:
    for process in processes:
        if (code := process.exitcode) is not None:
            how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return f"{what} {process.pid} {how}; `dmesg` on its node tells whether it was for want of memory"
    return None


def _engine_args(setup: RolloutSetup, node: EngineNode | None) -> AsyncEngineArgs:
    engine, on_cpu = setup.engine, platform().device.type == "cpu"
    extras: dict[str, Any] = {}
    if on_cpu:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(engine.cpu_kv_cache_gib)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # engines and trainers share the cores
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        from rlhf_ray.engines import cpu_kernels

        extras = {
            "worker_extension_cls": "rlhf_ray.engines.cpu_worker.WorkerExtension",
            "ir_op_priority": cpu_kernels.PRIORITY,
        }
    backend = transfer_backend(setup.beside_policy)
    if backend == "ipc":
        # Its updates hold handles of GPU memory, which vLLM sends to the engine's own process only as pickles, if that
        # is allowed. They come from the policy's ranks, through this actor.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if node is not None:
        extras |= {
            "nnodes": node.count,
            "node_rank": node.rank,
            "master_addr": node.host,
            "master_port": node.port,
        }
    return AsyncEngineArgs(
        model=setup.model,
        dtype=setup.dtype,
        tensor_parallel_size=setup.tensor_parallel,
        # The engine's own process does for one worker. Named by class because vLLM turns "uni" into a process
        # more on CPU, to set thread counts that Ray has set already.
        distributed_executor_backend=UniProcExecutor if setup.tensor_parallel == 1 else "mp",
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=max(engine.max_num_batched_tokens, engine.max_model_len),
        gpu_memory_utilization=engine.gpu_memory_utilization,
        enforce_eager=engine.enforce_eager or on_cpu,
        enable_prefix_caching=engine.prefix_caching,
        logprobs_mode="processed_logprobs",
        seed=setup.seed,
        trust_remote_code=setup.trust_remote_code,
        disable_log_stats=True,  # of vLLM's own loggers, which nobody reads here
        weight_transfer_config=WeightTransferConfig(backend=backend),
        enable_sleep_mode=setup.sleep > 0 and not on_cpu,
        generation_config="vllm",  # sampling comes from the job's config alone
        **extras,
        **_lora_settings(setup.adapter_rank),
        **_vocabulary_settings(setup),
    )


def _lora_settings(rank: int | None) -> dict[str, Any]:
    """One slot for the policy's adapter, of the least rank that vLLM has kernels for."""
    if rank is None:
        return {}
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min(known for known in get_args(MaxLoRARanks) if known >= rank),
    }


def _vocabulary_settings(setup: RolloutSetup) -> dict[str, Any]:
    """A mask over the rows of the vocabulary that no token has, for a model that has some."""
    tokenizer = load_tokenizer(setup.model, trust_remote_code=setup.trust_remote_code)
    config = load_config(setup.model, trust_remote_code=setup.trust_remote_code)
    ids = count_ids(tokenizer)
    if ids == config.get_text_config().vocab_size:
        return {}
    return {"logits_processors": [TOKENS_ONLY], "additional_config": {TOKEN_IDS: ids}}


def _sampling_params(sampling: Sampling, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_new_tokens,
        min_tokens=sampling.min_new_tokens,
        stop=list(sampling.stop) or None,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        ignore_eos=sampling.ignore_eos,
        include_stop_str_in_output=True,  # what was sampled is trained on, the stop string too
        seed=seed,
        logprobs=0,  # of the sampled token alone
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _trajectory(prompt: PromptRequest, output: CompletionOutput) -> Trajectory:
    tokens = list(output.token_ids)
    assert output.logprobs is not None
    logprobs = [places[token].logprob for places, token in zip(output.logprobs, tokens, strict=True)]
    versions = [0] * len(tokens)
    for span in output.weight_versions or []:
        versions[span.start : span.end] = [int(span.version)] * (span.end - span.start)
    reason = output.finish_reason
    if reason != "stop" and reason != "length":
        who = f"{prompt.uid}#{prompt.sample_index}"
        raise RuntimeError(
            f"vLLM ended the response to {who} after {len(tokens)} tokens with {reason!r}, so it is no sample: was the "
            "engine put to sleep while it generated?"
        )
    return Trajectory(
        prompt.uid, prompt.sample_index, prompt.seed, prompt.tokens, tokens, logprobs, versions, reason, row=prompt.row
    )
