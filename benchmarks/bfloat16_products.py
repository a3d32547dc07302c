"""The products of a linear layer in bfloat16 and float32, on this machine's CPU as it is and held back as older ones.

`python -m benchmarks.bfloat16_products`. oneDNN's variable `ONEDNN_MAX_CPU_ISA` makes a newer CPU behave like one that
has AVX-512 without bfloat16, or AVX2 alone; `dtype: auto` and its warnings rest on these numbers (platform.py).
"""

from time import perf_counter
from typing import Annotated

import torch
import typer

from benchmarks.common import CORES, Findings, FreshProcess, Measure, RoundsOption, ThreadsOption, run_benchmark

HELD_TO = {
    "as it is": {},
    "AVX512_CORE": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
Rates = dict[str, dict[str, float]]


def main(
    tokens: Annotated[int, typer.Option(min=1, help="Rows of the states.")] = 1024,
    inputs: Annotated[int, typer.Option(min=1, help="Width of the states that come in.")] = 576,
    outputs: Annotated[int, typer.Option(min=1, help="Width of those that go out.")] = 1536,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each product, of which the fastest counts.")] = 1.0,
    threads: ThreadsOption = CORES,
    rounds: RoundsOption = 3,
) -> Findings:
    """Speed of matrix products in bfloat16 as a multiple of that in float32."""
    measures = []
    for held, variables in HELD_TO.items():
        best: Rates = {}
        for _ in range(rounds):
            with FreshProcess(threads, variables) as process:
                for product, found in process.call(_rates, (tokens, inputs, outputs), seconds).items():
                    before = best.setdefault(product, dict.fromkeys(found, 0.0))
                    best[product] = {dtype: max(rate, before[dtype]) for dtype, rate in found.items()}
        for product, found in best.items():
            name = f"{held}, {product}"
            measures.append(Measure(f"{name}: bfloat16 ÷ float32", found["bfloat16"] / found["float32"]))
            measures += [Measure(f"{name}: {dtype}", rate / 1e9, "GFLOP/s") for dtype, rate in found.items()]
    return {f"{tokens} x {inputs} x {outputs}": measures}


def _rates(shape: tuple[int, int, int], seconds: float) -> Rates:
    """Operations a second, by product and number format."""
    tokens, inputs, outputs = shape
    found: Rates = {"states (x·Wᵀ)": {}, "gradients of states (g·W)": {}, "gradients of weights (gᵀ·x)": {}}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        x, w, g = (torch.randn(size).to(dtype) for size in ((tokens, inputs), (outputs, inputs), (tokens, outputs)))
        for product, (left, right) in zip(found, ((x, w.t()), (g, w), (g.t(), x)), strict=True):
            found[product][name] = 2 * tokens * inputs * outputs / _fastest(left, right, seconds)
    return found


def _fastest(left: torch.Tensor, right: torch.Tensor, seconds: float) -> float:
    left @ right
    best, end = float("inf"), perf_counter() + seconds
    while perf_counter() < end:
        began = perf_counter()
        left @ right
        best = min(best, perf_counter() - began)
    return best


if __name__ == "__main__":
    run_benchmark(main)
