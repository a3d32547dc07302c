"""Response tokens/s through the controller's path, against bare vLLM: `python -m benchmarks.rollout MODEL`.

Ours is `RolloutGroup.generate` over a real `RolloutWorker` actor: shards, streaming, a seed per sample, log-probs, and
every shard's trajectories fetched from Ray's object store as it arrives. Bare is `vllm.LLM.generate` with the same
engine settings, prompts and lengths: once plain (no seeds, log-probs or text, the least that vLLM can do; this ratio
counts), once with what ours asks of it. Every engine has the machine for itself, in a process of its own; sides take
turns, so that a machine that gets slower does not favour one.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import ray
import typer

from benchmarks.common import (
    CORES,
    RESULTS,
    ROOT,
    DataOption,
    Dtype,
    DtypeOption,
    FreshProcess,
    Machine,
    Measure,
    ModelArgument,
    RepeatsOption,
    ResultsOption,
    RoundsOption,
    ThreadsOption,
    process_env,
    report,
    run_command,
    say,
    spread,
)
from benchmarks.roles import SEED, TEMPERATURE, cluster, prompt_batches, rollout_role
from rlhf_ray.config.rollout import Rollout, RolloutEngine, Sampling
from rlhf_ray.data.requests import PromptRequest, cut_into_shards
from rlhf_ray.platform import platform

Side = Literal["ours", "bare", "bare with seeds and log-probs"]


@dataclass(frozen=True)
class Setting:
    """What all sides do.

    Attributes:
        batches: prompts of the warm-up, then of each timed repetition.
    """

    model: Path
    dtype: Dtype
    threads: int
    rollout: Rollout
    batches: Sequence[Sequence[PromptRequest]]


def main(
    model: ModelArgument,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in one repetition.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each response.")] = 48,
    dtype: DtypeOption = "bfloat16",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences that the engine decodes at a time.")] = 64,
    max_model_len: Annotated[int, typer.Option(min=2, help="Longest prompt and response together.")] = 128,
    shard_samples: Annotated[int, typer.Option(min=1, help="Samples that travel together.")] = 8,
    data: DataOption = ROOT / "data" / "imdb_prompts.jsonl",
    threads: ThreadsOption = CORES,
    repeats: RepeatsOption = 3,
    rounds: RoundsOption = 2,
    results: ResultsOption = RESULTS,
) -> None:
    """Response tokens/s of the rollout role, as a share of bare vLLM's."""
    arguments, machine = dict(locals()), Machine.here()
    rollout = Rollout(
        sampling=Sampling(temperature=TEMPERATURE, max_new_tokens=new_tokens, ignore_eos=True),
        engine=RolloutEngine(max_model_len=max_model_len, max_num_seqs=max_num_seqs),
        shard_samples=shard_samples,
    )
    # Other prompts in each round, but in a round the same for all sides.
    batches = prompt_batches(model, data, prompts, rounds * (1 + repeats), max_model_len - new_tokens)
    setting = Setting(model, dtype, threads, rollout, ())
    sides: dict[Side, Callable[[Setting], list[float]]] = {
        "ours": _ours,
        "bare": _bare_plain,
        "bare with seeds and log-probs": _bare_alike,
    }
    found: dict[Side, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        mine = replace(setting, batches=batches[number * (1 + repeats) : (number + 1) * (1 + repeats)])
        order = list(sides.items())[:: 1 if number % 2 == 0 else -1]
        for side, run in order:
            with FreshProcess(process_env(threads)) as process:
                rates = process.call(run, mine)
            found[side] += rates
            say(f"round {number + 1}/{rounds}, {side}: {' '.join(f'{rate:,.0f}' for rate in rates)} tokens/s")
    rate = {side: median(rates) for side, rates in found.items()}
    alike = rate["bare with seeds and log-probs"]
    report(
        "rollout",
        f"{model.name}, {dtype}",
        arguments,
        [
            Measure(name="response tokens/s ÷ bare vLLM", value=rate["ours"] / rate["bare"], asked="at least 0.90"),
            Measure(name="response tokens/s ÷ bare vLLM with seeds and log-probs", value=rate["ours"] / alike),
            Measure(name="through the controller", value=rate["ours"], unit="tokens/s"),
            Measure(name="bare vLLM", value=rate["bare"], unit="tokens/s"),
            Measure(name="bare vLLM with seeds and log-probs", value=alike, unit="tokens/s"),
            spread(*found.values()),
        ],
        machine,
        results,
    )


def _ours(setting: Setting) -> list[float]:
    """Tokens/s of each repetition."""
    rates = []
    with (
        cluster(),
        rollout_role(setting.model, setting.rollout, setting.dtype, engines=1, threads=setting.threads) as group,
    ):
        for requests in setting.batches:
            began = time.perf_counter()
            shards = cut_into_shards(requests, setting.rollout.shard_samples)
            tokens = 0
            for shard in group.generate(shards, version=0):
                tokens += len(ray.get(shard.trajectories, timeout=60).response_tokens)
            rates.append(tokens / (time.perf_counter() - began))
    return rates[1:]


def _bare_plain(setting: Setting) -> list[float]:
    return _bare(setting, alike=False)


def _bare_alike(setting: Setting) -> list[float]:
    return _bare(setting, alike=True)


def _bare(setting: Setting, *, alike: bool) -> list[float]:
    """Tokens/s of each repetition; `alike` asks for what the rollout role asks for."""
    engine, sampling = setting.rollout.engine, setting.rollout.sampling
    on_cpu = platform().device.type == "cpu"
    if on_cpu:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(engine.cpu_kv_cache_gib)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    llm = LLM(
        model=str(setting.model),
        dtype=setting.dtype,
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
    for requests in setting.batches:
        began = time.perf_counter()
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=request.tokens.tolist()) for request in requests],
            [params(request) for request in requests],
            use_tqdm=False,
        )
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        rates.append(tokens / (time.perf_counter() - began))
    llm.llm_engine.engine_core.shutdown()  # at its end this process would wait for the engine's
    return rates[1:]


if __name__ == "__main__":
    run_command(main)
