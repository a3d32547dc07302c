"""Speed of a weight sync, against a raw gloo broadcast of as many bytes: `python -m benchmarks.weight_sync MODEL`.

Ours is the whole of what a PPO step waits for: the policy actor's `send_weights`, in which the engines pause, receive,
load and repack the new weights, and go on. Raw is one broadcast of one flat tensor between as many fresh processes,
timed from a barrier until the last one has it. Both are warm; raw is measured before and after ours.
"""

from datetime import timedelta
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch._C._distributed_c10d import TCPStore
from transformers import AutoModelForCausalLM

from benchmarks.common import (
    CORES,
    DtypeOption,
    Findings,
    Measure,
    ModelArgument,
    RepeatsOption,
    ThreadsOption,
    on_ranks,
    run_benchmark,
    say,
    spread,
)
from benchmarks.roles import cluster, policy_and_engines, send_weights
from rlhf_ray.config.rollout import Rollout, RolloutEngine, Sampling
from rlhf_ray.config.training import Policy, TrainingEngine
from rlhf_ray.engines.collectives import Rendezvous
from rlhf_ray.engines.training import DTYPES
from rlhf_ray.models.heads import load_config

_MEGABYTE = 1e6


def main(
    model: ModelArgument,
    engines: Annotated[int, typer.Option(min=1, help="Rollout engines that receive.")] = 1,
    dtype: DtypeOption = "bfloat16",
    bucket_mib: Annotated[int, typer.Option(min=1, help="Most weights in flight at a time, in MiB.")] = 64,
    zero_stage: Annotated[int, typer.Option(min=0, max=3, help="DeepSpeed's ZeRO stage of the policy.")] = 2,
    threads: ThreadsOption = CORES,
    repeats: RepeatsOption = 7,
) -> Findings:
    """Megabytes/s of a weight sync, and its share of a raw gloo broadcast's."""
    size = _bytes_of(model, DTYPES[dtype])
    engine = TrainingEngine.model_validate({"zero_stage": zero_stage, "dtype": dtype})
    rollout = Rollout(
        sampling=Sampling(max_new_tokens=64),
        engine=RolloutEngine(max_model_len=128, max_num_seqs=64),
        sync_bucket_mib=bucket_mib,
    )
    raw = _raw(size, engines, threads, repeats)
    ours = _ours(Policy(model=str(model), engine=engine), rollout, engines, threads, repeats)
    raw += _raw(size, engines, threads, repeats)
    return {
        f"{model.name}, {dtype}, {engines} engine{'s' if engines > 1 else ''}": [
            Measure("weight sync ÷ raw gloo broadcast", median(raw) / median(ours), asked="at least 0.50"),
            Measure("weight sync", size / _MEGABYTE / median(ours), "MB/s"),
            Measure("raw gloo broadcast", size / _MEGABYTE / median(raw), "MB/s"),
            Measure("seconds of a sync", median(ours), "s"),
            Measure("size of the weights", size / _MEGABYTE, "MB"),
            spread(ours, raw),
        ]
    }


def _bytes_of(model: Path, dtype: torch.dtype) -> int:
    """Bytes that a sync sends: each parameter once, tied ones too."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(load_config(str(model)), dtype=dtype)
    empty.tie_weights()
    return sum(weight.numel() * weight.element_size() for weight in empty.parameters())


def _ours(policy: Policy, rollout: Rollout, engines: int, threads: int, repeats: int) -> list[float]:
    """Seconds of each sync."""
    with cluster(), policy_and_engines(policy, rollout, threads=threads, engines=engines) as (trainer, _):
        seconds = [send_weights(trainer, version) for version in range(1, repeats + 2)]  # the first is the warm-up
    say(f"syncs: {' '.join(f'{s:.3f}' for s in seconds)} s")
    return seconds[1:]


def _raw(size: int, engines: int, threads: int, repeats: int) -> list[float]:
    """Seconds of each broadcast, until the slowest receiver had it."""
    by_rank = on_ranks(1 + engines, threads, {}, _broadcasts, size, repeats)
    seconds = [max(ranks) for ranks in zip(*by_rank, strict=True)]
    say(f"raw broadcasts: {' '.join(f'{s:.3f}' for s in seconds)} s")
    return seconds[1:]


def _broadcasts(place: Rendezvous, size: int, repeats: int) -> list[float]:
    """Seconds of a warm-up and `repeats` broadcasts as one rank sees them."""
    timeout = timedelta(seconds=place.timeout_s)
    store = TCPStore(place.host, place.port, place.world_size, is_master=place.rank == 0, timeout=timeout)
    group = dist.ProcessGroupGloo(store, place.rank, place.world_size, timeout)
    buffer = torch.full((size,), place.rank, dtype=torch.uint8)
    seconds = []
    for _ in range(repeats + 1):
        group.barrier().wait()  # type: ignore[attr-defined]
        began = perf_counter()
        group.broadcast([buffer], dist.BroadcastOptions()).wait()  # type: ignore[attr-defined]
        seconds.append(perf_counter() - began)
    assert int(buffer[-1]) == 0
    group.barrier().wait()  # type: ignore[attr-defined]  # rank 0 holds the store
    return seconds


if __name__ == "__main__":
    run_benchmark(main)
