"""Most host memory of a rank while it loads a model with ZeRO-3: `python -m benchmarks.zero3_loading MODEL`.

Measured for an engine that scores, which holds weights alone, and for one that trains. Each is made once by ranks that
read their own parts, and once by ranks that load the whole model for DeepSpeed to cut up. The bound is a rank's share
of the weights and the largest parameter. `python -m benchmarks.random_model OUT` writes a model to try it on.
"""

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from benchmarks.common import DtypeOption, Findings, Measure, ModelArgument, on_ranks, run_benchmark, say
from benchmarks.resident import EXACT, forget_most, in_use, most_in_use
from rlhf_ray.config.training import Dtype, Optimizer, ScoringEngine, TrainingEngine
from rlhf_ray.engines.collectives import Rendezvous, join_collectives
from rlhf_ray.engines.training import DTYPES, ForwardEngine
from rlhf_ray.engines.training import TrainingEngine as Engine
from rlhf_ray.models.heads import empty_model, load_causal

Task = Literal["scores", "trains"]


def main(
    model: ModelArgument,
    dtype: DtypeOption = "bfloat16",
    ranks: Annotated[int, typer.Option(min=2, help="Ranks that share the model.")] = 2,
) -> Findings:
    """Peak memory of loading, as a share of a rank's part of the weights and the largest parameter."""
    shapes = empty_model(str(model), scalar=False, dtype=DTYPES[dtype])
    sizes = [parameter.numel() * parameter.itemsize for parameter in shapes.parameters()]
    found = {
        (task, sharded): _peak(model, dtype, ranks, task, sharded)
        for task in ("scores", "trains")
        for sharded in (True, False)
    }
    part = sum(sizes) / ranks + max(sizes)
    scores = found["scores", True].bytes
    measures = [
        Measure("memory of loading ÷ (share of the weights + largest parameter)", scores / part, asked="at most 1.10"),
        Measure("memory of loading ÷ all weights", scores / sum(sizes)),
        Measure("all weights", sum(sizes) / 1e6, "MB"),
        Measure("largest parameter", max(sizes) / 1e6, "MB"),
    ]
    for (task, sharded), peak in found.items():
        side = f"rank that {task}, {'its part' if sharded else 'whole model'} read"
        measures += [
            Measure(f"peak of a {side}", peak.bytes / 1e6, "MB"),
            Measure(f"seconds of a {side}", peak.seconds, "s"),
        ]
    return {f"{model.name}, {dtype}, {ranks} ranks": measures}


@dataclass(frozen=True)
class Peak:
    """Of the rank that took most memory: how much beyond what it had before, and how long it took."""

    bytes: int
    seconds: float


def _peak(model: Path, dtype: Dtype, ranks: int, task: Task, sharded: bool) -> Peak:
    peaks = on_ranks(ranks, 1, EXACT, _measure, model, dtype, task, sharded)
    most = max(peaks, key=lambda peak: peak.bytes)
    say(f"{task}, {'parts' if sharded else 'whole'}: {', '.join(f'{peak.bytes / 1e6:,.0f} MB' for peak in peaks)}")
    return most


def _measure(place: Rendezvous, model: Path, dtype: Dtype, task: Task, sharded: bool) -> Peak:
    join_collectives(place)
    gc.collect()
    before = in_use()
    forget_most()
    began = time.perf_counter()
    loaded = load_causal(str(model), dtype=DTYPES[dtype], vocab_chunk_tokens=256, sharded=sharded)
    if task == "scores":
        ForwardEngine(loaded, ScoringEngine(zero_stage=3, dtype=dtype))
    else:
        Engine(loaded, TrainingEngine(zero_stage=3, dtype=dtype), Optimizer(), total_steps=1)
    return Peak(most_in_use() - before, time.perf_counter() - began)


if __name__ == "__main__":
    run_benchmark(main)
