"""Attention and the log-prob head against float64 references: needs torch and transformers alone."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from benchmarks.gpu_check.check import Setting, at_most
from rlhf_ray.models.attention import Prefixes, packed_attention
from rlhf_ray.models.token_logprobs import TokenLogProbs
from rlhf_ray.platform import attention_of, platform

# Own tokens of each sequence, and start and length of the prefix that it shares with an earlier one.
_SEQUENCES: list[tuple[int, tuple[int, int]]] = [(70, (0, 0)), (5, (0, 40)), (33, (0, 70)), (1, (0, 0)), (128, (0, 0))]
_LIMITS = {torch.bfloat16: 0.02, torch.float32: 1e-4}


def attention(setting: Setting) -> str:
    """Packed attention and its gradients, with and without shared prefixes, in both formats."""
    found = []
    for dtype, limit in _LIMITS.items():
        worst = max(
            _attention_error(dtype, [own for own, _ in _SEQUENCES], prefixes)
            for prefixes in (None, tuple(prefix for _, prefix in _SEQUENCES))
        )
        kernel = attention_of(platform().device.type, dtype)
        found.append(at_most(f"{str(dtype).removeprefix('torch.')} ({kernel}) error", worst, limit))
    return "; ".join(found)


def head(setting: Setting) -> str:
    """Log-probs, entropies and gradients of a vocabulary head that is applied a block at a time."""
    found = []
    for dtype, limit in _LIMITS.items():
        random = torch.Generator().manual_seed(0)
        linear = torch.nn.Linear(64, 1000, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(1000, 64, generator=random) / 4)
        linear = linear.to(platform().device, dtype)
        states = torch.randn(300, 64, generator=random).to(platform().device, dtype).requires_grad_()
        targets = torch.randint(1000, (300,), generator=random).to(platform().device)
        mine = TokenLogProbs(linear, chunk_tokens=100)(states, targets, 0.7)
        log_p = (states.double() @ linear.weight.double().T / 0.7).log_softmax(-1)
        wanted = log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        worst = _worst(mine, wanted, (states, linear.weight))
        found.append(at_most(f"{str(dtype).removeprefix('torch.')} error", worst, limit))
    return "; ".join(found)


def _attention_error(dtype: torch.dtype, lengths: Sequence[int], prefixes: Prefixes | None) -> float:
    random = torch.Generator().manual_seed(0)
    states = [torch.randn(1, heads, sum(lengths), 64, generator=random) for heads in (8, 2, 2)]
    query, key, value = parts = [state.to(platform().device, dtype).requires_grad_() for state in states]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    longest = max(own + (prefixes[number][1] if prefixes else 0) for number, own in enumerate(lengths))
    mine, _ = packed_attention(
        torch.nn.Identity(),
        query,
        key,
        value,
        None,
        cu_seq_lens_q=starts.int().to(platform().device),
        max_length_q=longest,
        shared_prefixes=prefixes,
    )
    return _worst([mine], [_plain_attention(parts, starts.tolist(), prefixes)], parts)


def _plain_attention(parts: Sequence[torch.Tensor], starts: Sequence[int], prefixes: Prefixes | None) -> torch.Tensor:
    """In float64, one sequence at a time, with its scores written out."""
    query, key, value = (part[0].double() for part in parts)
    key, value = (states.repeat_interleave(len(query) // len(states), 0) for states in (key, value))
    out = []
    for number, (start, end) in enumerate(pairwise(starts)):
        before, length = prefixes[number] if prefixes else (0, 0)
        places = [*range(before, before + length), *range(start, end)]
        scores = query[:, start:end] @ key[:, places].mT / 8
        seen = torch.ones(end - start, len(places), dtype=torch.bool, device=scores.device).tril(length)
        out.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[:, places])
    return torch.cat(out, 1).transpose(0, 1)[None]


def _worst(mine: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> float:
    """Largest relative error of some outputs, and of the gradients of a random sum of them."""
    upstream = [torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device) for out in wanted]

    def gradients(outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        total = torch.stack([(out.double() * by).sum() for out, by in zip(outputs, upstream, strict=True)]).sum()
        return torch.autograd.grad(total, inputs)

    references = [tensor.detach().double() for tensor in (*wanted, *gradients(wanted))]
    pairs = zip([*mine, *gradients(mine)], references, strict=True)
    return max(float((got.detach().double() - want).norm() / want.norm()) for got, want in pairs)
