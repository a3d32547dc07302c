"""Attention of one layer in bfloat16 on a CPU, against PyTorch's fused kernel: `python -m benchmarks.attention`.

Ours is `rlhf_ray.models.blockwise_attention`. Both sides take the same states in one process, in turns. Errors are
relative to attention in float32, the larger of those of the result and its three gradients.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Annotated

import torch
import typer

from benchmarks.common import (
    CORES,
    Findings,
    FreshProcess,
    Measure,
    RepeatsOption,
    ThreadsOption,
    run_benchmark,
    spread,
)
from rlhf_ray.models.attention import fused_attention
from rlhf_ray.models.blockwise_attention import causal_attention

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def main(
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of one pass.")] = 6,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 512,
    heads: Annotated[int, typer.Option(min=1, help="Heads of the queries.")] = 9,
    kv_heads: Annotated[int, typer.Option(min=1, help="Heads of keys and values; divides the others.")] = 3,
    head_size: Annotated[int, typer.Option(min=1, help="Numbers of a head.")] = 64,
    threads: ThreadsOption = CORES,
    repeats: RepeatsOption = 20,
) -> Findings:
    """Speed of attention as a multiple of that of PyTorch's fused kernel."""
    if heads % kv_heads:
        raise typer.BadParameter(f"{kv_heads} does not divide --heads ({heads})", param_hint="--kv-heads")
    shapes = [(sequences, length, number, head_size) for number in (heads, kv_heads, kv_heads, heads)]
    with FreshProcess(threads) as process:
        times, errors = process.call(_compare, shapes, repeats)
    whole = {side: [sum(both) for both in zip(*passes, strict=True)] for side, passes in times.items()}
    measures = [
        Measure("speed of attention ÷ PyTorch's fused kernel's", median(whole["fused"]) / median(whole["ours"]))
    ]
    for side, passes in times.items():
        for name, seconds in zip(("forward", "backward"), passes, strict=True):
            measures.append(Measure(f"{side}, {name}", 1e3 * median(seconds), "ms"))
        measures.append(Measure(f"{side}, relative error", errors[side]))
    subject = f"{sequences} x {length} tokens, {heads} heads over {kv_heads} of {head_size}, bfloat16"
    return {subject: [*measures, spread(*whole.values())]}


def _compare(
    shapes: list[tuple[int, ...]], repeats: int
) -> tuple[dict[str, tuple[list[float], list[float]]], dict[str, float]]:
    """By side: seconds of each forward and each backward pass, and the error."""
    torch.manual_seed(0)
    *states, grad = (torch.randn(shape).bfloat16() for shape in shapes)
    _, wanted = _passes(fused_attention, [part.float() for part in states], grad.float())
    ours = partial(causal_attention, scale=shapes[0][-1] ** -0.5)
    sides: dict[str, Attention] = {"ours": ours, "fused": fused_attention}
    times: dict[str, tuple[list[float], list[float]]] = {side: ([], []) for side in sides}
    found = {}
    for turn in range(repeats + 1):
        for side, attention in sides.items():
            seconds, found[side] = _passes(attention, states, grad)
            if turn:  # the first is the warm-up
                for series, value in zip(times[side], seconds, strict=True):
                    series.append(value)
    return times, {side: _error(results, wanted) for side, results in found.items()}


def _error(results: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(float((got.float() - exact).norm() / exact.norm()) for got, exact in zip(results, wanted, strict=True))


def _passes(
    attention: Attention, states: list[torch.Tensor], grad: torch.Tensor
) -> tuple[tuple[float, float], list[torch.Tensor]]:
    """Seconds of forward and backward pass, and the result with its gradients."""
    query, key, value = (part.detach().requires_grad_() for part in states)
    start = perf_counter()
    out = attention(query, key, value)
    middle = perf_counter()
    gradients = torch.autograd.grad(out, (query, key, value), grad)
    return (middle - start, perf_counter() - middle), [out.detach(), *gradients]


if __name__ == "__main__":
    run_benchmark(main)
