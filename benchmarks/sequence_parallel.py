"""Peak memory of one long sequence, alone and shared: `python -m benchmarks.sequence_parallel MODEL`.

Forward and backward pass of the mean −log p of all tokens of one sequence: by one process, then by as many as
`--ranks`, each of which holds its part of the tokens (`sequence_parallel`). Counted is what the kernel saw at most in
memory, less what was there when the model had its weights and gradients. Losses and gradients of both sides are
compared, so it is known that they do the same work. There is no optimizer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import typer

from benchmarks.common import DtypeOption, Findings, Measure, ModelArgument, ThreadsOption, on_ranks, run_benchmark, say
from benchmarks.resident import EXACT, forget_most, in_use, most_in_use
from rlhf_ray.config.training import Dtype
from rlhf_ray.engines.collectives import Rendezvous, join_collectives, share_sequences
from rlhf_ray.engines.training import DTYPES
from rlhf_ray.models.heads import check_heads, load_causal
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.models.role_models import CausalModel

SEED = 7


@dataclass(frozen=True)
class Peak:
    """What one rank saw.

    Attributes:
        bytes: most memory in use beyond weights and gradients.
        loss: of the sequence.
        grad_norm: of the gradient, added up over ranks.
    """

    bytes: int
    loss: float
    grad_norm: float


def main(
    model: ModelArgument,
    dtype: DtypeOption = "bfloat16",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the sequence.")] = 8192,
    ranks: Annotated[int, typer.Option(min=2, help="Processes that share it.")] = 2,
    vocab_chunk_tokens: Annotated[int, typer.Option(min=1, help="As in the config.")] = 256,
    recompute: Annotated[bool, typer.Option(help="With engine.activation_checkpointing.")] = False,
    threads: ThreadsOption = 1,
) -> Findings:
    """Peak memory of each of several ranks that share a sequence, as a share of one rank's that has it alone."""
    check_heads(str(model), ranks)
    found: dict[int, list[Peak]] = {}
    for count in (1, ranks):
        found[count] = on_ranks(count, threads, EXACT, _measure, model, dtype, tokens, vocab_chunk_tokens, recompute)
        say(f"{count} ranks: {' '.join(f'{peak.bytes / 1e6:,.0f}' for peak in found[count])} MB")
    [alone], shared = found[1], found[ranks]
    most = max(peak.bytes for peak in shared)
    return {
        f"{model.name}, {dtype}, {tokens} tokens, {ranks} ranks" + (", recomputed" if recompute else ""): [
            Measure("peak memory of a rank ÷ that of one rank alone", most / alone.bytes),
            Measure("one rank alone", alone.bytes / 1e6, "MB"),
            Measure("each of the ranks, at most", most / 1e6, "MB"),
            Measure("relative difference of the losses", abs(shared[0].loss / alone.loss - 1)),
            Measure("relative difference of the gradient norms", abs(shared[0].grad_norm / alone.grad_norm - 1)),
        ]
    }


def _measure(
    place: Rendezvous, folder: Path, dtype: Dtype, tokens: int, vocab_chunk_tokens: int, recompute: bool
) -> Peak:
    join_collectives(place)
    model = load_causal(str(folder), dtype=DTYPES[dtype], vocab_chunk_tokens=vocab_chunk_tokens)
    if place.world_size > 1:
        model.sequence_parallel = share_sequences(place.world_size)
    if recompute:
        model.train()
        model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    text = np.random.default_rng(SEED).integers(0, len(model.token_logprobs.weight), tokens, dtype=np.int32)
    _loss(model, text[:64]).backward()  # allocates what stays: gradients, and what libraries keep
    model.zero_grad(set_to_none=False)
    before = in_use()
    forget_most()
    loss = _loss(model, text)
    loss.backward()
    most = most_in_use()
    squares = torch.zeros((), dtype=torch.float64)
    for weight in model.parameters():
        assert weight.grad is not None
        gradient = weight.grad.float()
        dist.all_reduce(gradient)
        squares += gradient.double().square().sum()
    dist.barrier()
    dist.destroy_process_group()
    return Peak(most - before, float(loss.detach()), float(squares.sqrt()))


def _loss(model: CausalModel, text: np.ndarray) -> torch.Tensor:
    packed = PackedSequences.of([text], torch.device("cpu"))
    logprobs, _ = model(packed, torch.arange(len(text) - 1), packed.input_ids[0, 1:], 1.0, "nothing")
    return -logprobs.mean()


if __name__ == "__main__":
    run_benchmark(main)
