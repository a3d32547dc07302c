"""Generation without this package's actors and engine: `vllm.LLM.generate` with the same settings."""

import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from benchmarks.roles import SEED
from rlhf_ray.config.rollout import Rollout
from rlhf_ray.config.training import Dtype
from rlhf_ray.data.requests import PromptRequest
from rlhf_ray.platform import platform


def bare_rates(
    model: Path, dtype: Dtype, rollout: Rollout, batches: Sequence[Sequence[PromptRequest]], *, alike: bool = False
) -> list[float]:
    """Tokens/s of each batch but the first; `alike` asks for the seeds and log-probs that the rollout role asks for."""
    engine, sampling = rollout.engine, rollout.sampling
    on_cpu = platform().device.type == "cpu"
    if on_cpu:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(engine.cpu_kv_cache_gib)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    llm = LLM(
        model=str(model),
        dtype=dtype,
        distributed_executor_backend=UniProcExecutor,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=max(engine.max_num_batched_tokens, engine.max_model_len),
        gpu_memory_utilization=engine.gpu_memory_utilization,
        enforce_eager=engine.enforce_eager or on_cpu,
        enable_prefix_caching=engine.prefix_caching,
        logprobs_mode="processed_logprobs" if alike else "raw_logprobs",
        seed=SEED,
        generation_config="vllm",
    )

    def params(request: PromptRequest) -> SamplingParams:
        return SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            ignore_eos=sampling.ignore_eos,
            detokenize=False,
            seed=request.seed if alike else None,
            logprobs=0 if alike else None,
        )

    rates = []
    for requests in batches:
        began = perf_counter()
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=request.tokens.tolist()) for request in requests],
            [params(request) for request in requests],
            use_tqdm=False,
        )
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        rates.append(tokens / (perf_counter() - began))
    llm.llm_engine.engine_core.shutdown()  # at its end this process would wait for the engine's
    return rates[1:]
