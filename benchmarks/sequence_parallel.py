"""Peak memory of one long sequence, alone and shared: `python -m benchmarks.sequence_parallel MODEL`.

Forward and backward pass of the mean −log p of all tokens of one sequence: by one process, then by as many as
`--ranks`, each of which holds its part of the tokens (`sequence_parallel`). Counted is what the kernel saw at most in
memory, less what was there when the model had its weights and gradients. Losses and gradients of both sides are
compared, so it is known that they do the same work. There is no optimizer.
"""

import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import typer

from benchmarks.common import (
    RESULTS,
    Dtype,
    DtypeOption,
    FreshProcess,
    Machine,
    Measure,
    ModelArgument,
    ResultsOption,
    ThreadsOption,
    process_env,
    report,
    run_command,
    say,
)
from benchmarks.resident import EXACT, forget_most, in_use, most_in_use
from rlhf_ray.engines.collectives import Rendezvous, join_collectives, share_sequences
from rlhf_ray.engines.training import DTYPES
from rlhf_ray.models.heads import check_heads, load_causal
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.models.role_models import CausalModel

SEED = 7
_TIMEOUT_S = 600.0


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
    results: ResultsOption = RESULTS,
) -> None:
    """Peak memory of each of several ranks that share a sequence, as a share of one rank's that has it alone."""
    check_heads(str(model), ranks)
    arguments, machine = dict(locals()), Machine.here()
    found: dict[int, list[Peak]] = {}
    for count in (1, ranks):
        found[count] = _peaks(count, model, dtype, tokens, vocab_chunk_tokens, recompute, threads)
        say(f"{count} ranks: {' '.join(f'{peak.bytes / 1e6:,.0f}' for peak in found[count])} MB")
    [alone], shared = found[1], found[ranks]
    most = max(peak.bytes for peak in shared)
    report(
        "sequence_parallel",
        f"{model.name}, {dtype}, {tokens} tokens, {ranks} ranks" + (", recomputed" if recompute else ""),
        arguments,
        [
            Measure(name="peak memory of a rank ÷ that of one rank alone", value=most / alone.bytes),
            Measure(name="one rank alone", value=alone.bytes / 1e6, unit="MB"),
            Measure(name="each of the ranks, at most", value=most / 1e6, unit="MB"),
            Measure(name="relative difference of the losses", value=abs(shared[0].loss / alone.loss - 1)),
            Measure(
                name="relative difference of the gradient norms", value=abs(shared[0].grad_norm / alone.grad_norm - 1)
            ),
        ],
        machine,
        results,
    )


def _peaks(
    ranks: int, model: Path, dtype: Dtype, tokens: int, vocab_chunk_tokens: int, recompute: bool, threads: int
) -> list[Peak]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ExitStack() as stack:
        processes = [stack.enter_context(FreshProcess({**process_env(threads), **EXACT})) for _ in range(ranks)]
        for process in processes:
            process.call(torch.set_num_threads, threads)
        places = [Rendezvous(rank, ranks, "127.0.0.1", port, _TIMEOUT_S) for rank in range(ranks)]
        waiting = [
            process.start(_measure, place, model, dtype, tokens, vocab_chunk_tokens, recompute)
            for process, place in zip(processes, places, strict=True)
        ]
        return [wait() for wait in waiting]


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
    run_command(main)
