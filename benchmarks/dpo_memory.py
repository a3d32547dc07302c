"""Peak memory of DPO on one micro-batch, against the plain way: `python -m benchmarks.dpo_memory MODEL`.

A forward pass of the reference, then a forward and a backward pass of the policy, over pairs of random tokens without
prompts, so that every token but the first of a text is predicted. Ours runs the texts packed through `CausalModel`,
which never has more logits than those of `--vocab-chunk-tokens` positions. The plain way is `model(...).logits`,
log-softmax in float32 and gather. A third side stops before the vocabulary head: what the others take beyond it is the
head's.

Each side has a process of its own. Counted is what the kernel saw at most in memory, less what was there when both
models were loaded. There is no optimizer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import typer
from transformers import AutoModelForCausalLM

from benchmarks.bare_update import hidden_states
from benchmarks.common import (
    CORES,
    DtypeOption,
    Findings,
    FreshProcess,
    Measure,
    ModelArgument,
    ThreadsOption,
    run_benchmark,
    say,
)
from benchmarks.resident import EXACT, forget_most, in_use, most_in_use
from rlhf_ray.config.training import Dtype
from rlhf_ray.engines.training import DTYPES
from rlhf_ray.models.heads import load_causal, load_config
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.models.role_models import CausalModel

Side = Literal["ours", "plain", "without head"]

BETA = 0.1
SEED = 7


def main(
    model: ModelArgument,
    dtype: DtypeOption = "bfloat16",
    tokens: Annotated[int, typer.Option(min=4, help="Tokens of the micro-batch.")] = 4096,
    text_tokens: Annotated[int, typer.Option(min=2, help="Tokens of one text; two texts are a pair.")] = 512,
    vocab_chunk_tokens: Annotated[int, typer.Option(min=1, help="As in the config.")] = 256,
    threads: ThreadsOption = CORES,
) -> Findings:
    """Peak memory of forward and backward pass of DPO, as a share of the plain way's."""
    if tokens % (2 * text_tokens):
        raise typer.BadParameter(f"must be whole pairs of {2 * text_tokens} tokens", param_hint="--tokens")
    texts = np.random.default_rng(SEED).integers(
        0, load_config(str(model)).vocab_size, (tokens // text_tokens, text_tokens), dtype=np.int32
    )
    found: dict[Side, Peak] = {}
    sides: tuple[Side, ...] = ("ours", "plain", "without head")
    for side in sides:
        with FreshProcess(threads, EXACT) as process:
            found[side] = process.call(_measure, side, model, dtype, texts, vocab_chunk_tokens)
        say(f"{side}: {found[side].bytes / 1e6:,.0f} MB, loss {found[side].loss:.6f}")
    ours, plain, rest = (found[side].bytes for side in sides)
    logits = tokens * load_config(str(model)).vocab_size * 4
    return {
        f"{model.name}, {dtype}": [
            Measure("peak memory of DPO ÷ the plain way's", ours / plain),
            Measure("DPO", ours / 1e6, "MB"),
            Measure("plain way", plain / 1e6, "MB"),
            Measure("without vocabulary head", rest / 1e6, "MB"),
            Measure("all logits in float32", logits / 1e6, "MB"),
            Measure("memory of our vocabulary head ÷ all logits", (ours - rest) / logits),
            Measure("memory of the plain head ÷ all logits", (plain - rest) / logits),
            Measure("relative difference of the losses", abs(found["ours"].loss / found["plain"].loss - 1)),
        ]
    }


@dataclass(frozen=True)
class Peak:
    """Most memory in use beyond the models, and the loss."""

    bytes: int
    loss: float


def _measure(side: Side, model: Path, dtype: Dtype, texts: np.ndarray, chunk: int) -> Peak:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        policy, reference = (_load(side, model, dtype, chunk) for _ in range(2))
        # So that the loss is not that of a policy which is its reference.
        _shake(policy)
    logprobs = {"ours": _ours, "plain": _plain, "without head": _without_head}[side]
    before = in_use()
    forget_most()
    with torch.no_grad():
        given = logprobs(reference, texts)
    margins = (logprobs(policy, texts) - given).view(-1, 2)
    loss = -F.logsigmoid(BETA * (margins[:, 0] - margins[:, 1])).mean()
    loss.backward()
    return Peak(most_in_use() - before, float(loss.detach()))


def _load(side: Side, model: Path, dtype: Dtype, chunk: int) -> Any:
    if side == "plain":
        return AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype])
    return load_causal(str(model), dtype=DTYPES[dtype], vocab_chunk_tokens=chunk)


@torch.no_grad()
def _shake(policy: torch.nn.Module) -> None:
    for weight in policy.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.01 * float(weight.std()))


def _ours(model: CausalModel, texts: np.ndarray) -> torch.Tensor:
    """Sums of the log-probs of each text, `[texts]`."""
    places = torch.arange(texts.size).view(texts.shape)
    packed = PackedSequences.of(list(texts), torch.device("cpu"))
    logprobs, _ = model(packed, places[:, :-1].flatten(), torch.from_numpy(texts[:, 1:]).long().flatten(), 1.0)
    return logprobs.view(len(texts), -1).sum(1)


def _plain(model: Any, texts: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(texts).long()
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    sums: torch.Tensor = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].sum(1)
    return sums


def _without_head(model: CausalModel, texts: np.ndarray) -> torch.Tensor:
    """Any sums that the backward pass starts from."""
    hidden = hidden_states(model.model, PackedSequences.of(list(texts), torch.device("cpu")))
    return hidden.float().mean(-1).view(texts.shape).sum(1)


if __name__ == "__main__":
    run_benchmark(main)
