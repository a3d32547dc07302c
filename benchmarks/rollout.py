"""Response tokens/s through the controller's path, against bare vLLM: `python -m benchmarks.rollout MODEL`.

Ours is `RolloutGroup.generate` over a real `RolloutWorker` actor: shards, streaming, a seed per sample, log-probs, and
every shard's trajectories fetched from Ray's object store as it arrives. Bare is `vllm.LLM.generate` with the same
engine settings, prompts and lengths: once plain (no seeds, log-probs or text, the least that vLLM can do; this ratio
counts), once with what ours asks of it. Every engine has the machine for itself, in a process of its own; sides take
turns, so that a machine that gets slower does not favour one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import typer

from benchmarks.bare_rollout import bare_rates
from benchmarks.common import (
    CORES,
    ROOT,
    DataOption,
    DtypeOption,
    Findings,
    FreshProcess,
    Measure,
    ModelArgument,
    RepeatsOption,
    RoundsOption,
    ThreadsOption,
    in_turns,
    run_benchmark,
    say,
    spread,
)
from benchmarks.roles import TEMPERATURE, cluster, prompt_batches, rollout_role, sample_rates
from rlhf_ray.config.rollout import Rollout, RolloutEngine, Sampling
from rlhf_ray.config.training import Dtype
from rlhf_ray.data.requests import PromptRequest

Side = Literal["ours", "bare", "bare with seeds and log-probs"]


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
) -> Findings:
    """Response tokens/s of the rollout role, as a share of bare vLLM's."""
    rollout = Rollout(
        sampling=Sampling(temperature=TEMPERATURE, max_new_tokens=new_tokens, ignore_eos=True),
        engine=RolloutEngine(max_model_len=max_model_len, max_num_seqs=max_num_seqs),
        shard_samples=shard_samples,
    )
    # Other prompts in each round, but in a round the same for all sides; the first batch is the warm-up.
    count = 1 + repeats
    batches = prompt_batches(model, data, prompts, rounds * count, max_model_len - new_tokens)
    sides: dict[Side, Callable[..., list[float]]] = {
        "ours": partial(_ours, threads),
        "bare": bare_rates,
        "bare with seeds and log-probs": partial(bare_rates, alike=True),
    }
    found: dict[Side, list[float]] = {side: [] for side in sides}
    for number, side in in_turns(list(sides), rounds):
        with FreshProcess(threads) as process:
            rates = process.call(sides[side], model, dtype, rollout, batches[(number - 1) * count :][:count])
        found[side] += rates
        say(f"round {number}/{rounds}, {side}: {' '.join(f'{rate:,.0f}' for rate in rates)} tokens/s")
    rate = {side: median(rates) for side, rates in found.items()}
    alike = rate["bare with seeds and log-probs"]
    return {
        f"{model.name}, {dtype}": [
            Measure("response tokens/s ÷ bare vLLM", rate["ours"] / rate["bare"], asked="at least 0.90"),
            Measure("response tokens/s ÷ bare vLLM with seeds and log-probs", rate["ours"] / alike),
            Measure("through the controller", rate["ours"], "tokens/s"),
            Measure("bare vLLM", rate["bare"], "tokens/s"),
            Measure("bare vLLM with seeds and log-probs", alike, "tokens/s"),
            spread(*found.values()),
        ]
    }


def _ours(
    threads: int, model: Path, dtype: Dtype, rollout: Rollout, batches: Sequence[Sequence[PromptRequest]]
) -> list[float]:
    with cluster(), rollout_role(model, rollout, dtype, threads=threads) as group:
        return sample_rates(group, rollout, batches)


if __name__ == "__main__":
    run_benchmark(main)
