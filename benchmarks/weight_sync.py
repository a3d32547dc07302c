"""Speed of a weight sync, against a raw gloo broadcast of as many bytes: `python -m benchmarks.weight_sync MODEL`.

Ours is the whole of what a PPO step waits for: the policy actor's `send_weights`, in which the engines pause, receive,
load and repack the new weights, and go on. Raw is one broadcast of one flat tensor between as many fresh processes,
timed from a barrier until the last one has it. Both are warm; raw is measured before and after ours.
"""

import socket
from contextlib import ExitStack
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
    RESULTS,
    DtypeOption,
    FreshProcess,
    Machine,
    Measure,
    ModelArgument,
    RepeatsOption,
    ResultsOption,
    ThreadsOption,
    process_env,
    report,
    run_command,
    say,
    spread,
)
from benchmarks.roles import cluster, connect, policy_role, rollout_role, send_weights
from rlhf_ray.config.rollout import Rollout, RolloutEngine, Sampling
from rlhf_ray.config.training import Policy, TrainingEngine
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
    results: ResultsOption = RESULTS,
) -> None:
    """Megabytes/s of a weight sync, and its share of a raw gloo broadcast's."""
    arguments, machine = dict(locals()), Machine.here()
    size = _bytes_of(model, DTYPES[dtype])
    engine = TrainingEngine.model_validate({"zero_stage": zero_stage, "dtype": dtype})
    raw = _raw(size, engines, threads, repeats)
    ours = _ours(model, Policy(model=str(model), engine=engine), engines, bucket_mib, threads, repeats)
    raw += _raw(size, engines, threads, repeats)
    report(
        "weight_sync",
        f"{model.name}, {dtype}, {engines} engine{'s' if engines > 1 else ''}",
        arguments,
        [
            Measure(name="weight sync ÷ raw gloo broadcast", value=median(raw) / median(ours), asked="at least 0.50"),
            Measure(name="weight sync", value=size / _MEGABYTE / median(ours), unit="MB/s"),
            Measure(name="raw gloo broadcast", value=size / _MEGABYTE / median(raw), unit="MB/s"),
            Measure(name="seconds of a sync", value=median(ours), unit="s"),
            Measure(name="size of the weights", value=size / _MEGABYTE, unit="MB"),
            spread(ours, raw),
        ],
        machine,
        results,
    )


def _bytes_of(model: Path, dtype: torch.dtype) -> int:
    """Bytes that a sync sends: each parameter once, tied ones too."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(load_config(str(model)), dtype=dtype)
    empty.tie_weights()
    return sum(weight.numel() * weight.element_size() for weight in empty.parameters())


def _ours(model: Path, policy: Policy, engines: int, bucket_mib: int, threads: int, repeats: int) -> list[float]:
    """Seconds of each sync."""
    rollout = Rollout(sampling=Sampling(max_new_tokens=64), engine=RolloutEngine(max_model_len=128, max_num_seqs=64))
    seconds = []
    with (
        cluster(),
        policy_role(policy, threads=threads) as trainer,
        rollout_role(model, rollout, policy.engine.dtype, engines=engines, threads=threads) as group,
    ):
        connect(trainer, group, bucket_mib * 2**20)
        for version in range(1, repeats + 2):  # the first is the warm-up
            began = perf_counter()
            send_weights(trainer, version)
            seconds.append(perf_counter() - began)
    say(f"syncs: {' '.join(f'{s:.3f}' for s in seconds)} s")
    return seconds[1:]


def _raw(size: int, engines: int, threads: int, repeats: int) -> list[float]:
    """Seconds of each broadcast, until the slowest receiver had it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = 1 + engines
    with ExitStack() as stack:
        processes = [stack.enter_context(FreshProcess(process_env(threads))) for _ in range(world)]
        waiting = [p.start(_broadcasts, rank, world, port, size, repeats) for rank, p in enumerate(processes)]
        seconds = [max(ranks) for ranks in zip(*(wait() for wait in waiting), strict=True)]
    say(f"raw broadcasts: {' '.join(f'{s:.3f}' for s in seconds)} s")
    return seconds[1:]


def _broadcasts(rank: int, world: int, port: int, size: int, repeats: int) -> list[float]:
    """Seconds of a warm-up and `repeats` broadcasts as one rank sees them."""
    timeout = timedelta(seconds=300)
    store = TCPStore("127.0.0.1", port, world, is_master=rank == 0, timeout=timeout)
    group = dist.ProcessGroupGloo(store, rank, world, timeout)
    buffer = torch.full((size,), rank, dtype=torch.uint8)
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
    run_command(main)
