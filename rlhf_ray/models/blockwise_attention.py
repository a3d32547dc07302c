"""Causal attention in bfloat16 on CPUs, put together from batched products over blocks of queries.

Where PyTorch's fused kernel for CPUs multiplies, oneDNN's batched products in bfloat16 are several times as fast. So
the queries of a block meet all keys up to its end in one product for all sequences and heads. As in FlashAttention (Dao
et al. 2022, arXiv:2205.14135) the weights of a block are dropped, and made again in the backward pass.

A product comes out rounded, with an error relative to its size. What is to be subtracted from a row of products, such
as the peak of its scores, is therefore subtracted inside of the product, by further columns of its factors: large
weights then come from small numbers, and no digits cancel.
"""

from collections.abc import Iterator
from typing import Any

import torch

# Fewer queries are more calls, more are more scores of later keys, which count for nothing.
_QUERIES_PER_BLOCK = 128


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale · QKᵀ)·V, where each place sees those up to itself.

    Args:
        query: `[sequences, length, heads, size]`; `key` and `value` may have fewer heads (grouped queries).
        scale: of the scores.

    Returns:
        `[sequences, length, heads, size]`, the size being that of `value`.
    """
    out: torch.Tensor = _CausalAttention.apply(query, key, value, scale)
    return out


class _CausalAttention(torch.autograd.Function):
    """With weights W = exp(scale · (QKᵀ − peak)) and the sums s of their rows, O = WV/s.

    Backward, with D = (∂L/∂O)/s and δ = D·O of each row: ∂V = WᵀD, S = W∘(DVᵀ − δ), ∂Q = scale · SK, ∂K = scale · SᵀQ.
    Below, tensors are `[sequences and heads of keys, rows, size]`; rows of a block are its queries, head by head.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        heads = key.shape[2]
        keys, values = _rows(key, heads), _rows(value, heads)
        out = query.new_empty(*query.shape[:3], value.shape[3])
        peaks, sums = [], []
        for block in _blocks(query):
            queries, seen = _rows(query[:, block], heads), slice(block.stop)
            peaks.append(_peaks(queries, keys[:, seen], block))
            weights = _weights(queries, peaks[-1], keys[:, seen], scale, block)
            sums.append(weights.sum(-1, keepdim=True, dtype=torch.promote_types(weights.dtype, torch.float32)))
            _put(torch.bmm(weights, values[:, seen]) / sums[-1], out[:, block], heads)
        ctx.save_for_backward(query, key, value, out, *peaks, *sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, *statistics = ctx.saved_tensors
        heads = key.shape[2]
        keys, values = _rows(key, heads), _rows(value, heads)
        by_query, by_key, by_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        by_keys, by_values = (torch.zeros_like(rows, dtype=statistics[-1].dtype) for rows in (keys, values))
        blocks = list(_blocks(query))
        for block, peaks, sums in zip(blocks, statistics[: len(blocks)], statistics[len(blocks) :], strict=True):
            queries, seen = _rows(query[:, block], heads), slice(block.stop)
            weights = _weights(queries, peaks, keys[:, seen], ctx.scale, block)
            by_out = (_rows(grads[0][:, block], heads) / sums).to(query.dtype)
            offset = (by_out.to(sums.dtype) * _rows(out[:, block], heads)).sum(-1, keepdim=True)
            by_scores = _less(by_out, offset, values[:, seen], 1.0).mul_(weights)
            _put(_product(by_scores, keys[:, seen], ctx.scale), by_query[:, block], heads)
            by_keys[:, seen] += torch.bmm(by_scores.mT, queries)
            by_values[:, seen] += torch.bmm(weights.mT, by_out)
        _put(by_keys.mul_(ctx.scale), by_key, heads)
        _put(by_values, by_value, heads)
        return by_query, by_key, by_value, None


def _blocks(query: torch.Tensor) -> Iterator[slice]:
    length = query.shape[1]
    for start in range(0, length, _QUERIES_PER_BLOCK):
        yield slice(start, min(start + _QUERIES_PER_BLOCK, length))


def _rows(states: torch.Tensor, heads: int) -> torch.Tensor:
    """`[sequences, places, heads, size]` as `[sequences * heads of keys, rows, size]`."""
    return _grouped(states, heads).flatten(2, 3).flatten(0, 1)


def _put(rows: torch.Tensor, states: torch.Tensor, heads: int) -> None:
    """Write what `_rows` would give of `states`."""
    places = _grouped(states, heads)
    places.copy_(rows.view(places.shape))


def _grouped(states: torch.Tensor, heads: int) -> torch.Tensor:
    """A view `[sequences, heads of keys, heads of queries for each, places, size]`."""
    return states.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)


def _peaks(queries: torch.Tensor, keys: torch.Tensor, block: slice) -> torch.Tensor:
    """Largest score of each row before scaling, `[..., rows, 1]`."""
    scores = torch.bmm(queries, keys.mT)
    size = block.stop - block.start
    later = torch.full((size, size), -torch.inf, dtype=scores.dtype).triu(1)
    scores.view(-1, size, block.stop)[..., block].add_(later)
    return scores.amax(-1, keepdim=True)


def _weights(
    queries: torch.Tensor, peaks: torch.Tensor, keys: torch.Tensor, scale: float, block: slice
) -> torch.Tensor:
    """exp(scale · (QKᵀ − peak)), 0 for later keys. Numbers alike in both passes, as what is summed up must be what is
    multiplied."""
    weights = _less(queries, peaks, keys, scale).exp_()
    weights.view(-1, block.stop - block.start, block.stop).tril_(block.start)
    return weights


def _less(left: torch.Tensor, offset: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · (left · rightᵀ − offset), rounded once; `offset` is `[..., rows, 1]`, and its format may have more
    digits."""
    high = offset.to(left.dtype)
    low = (offset - high).to(left.dtype)
    ones = torch.ones_like(right[..., :1])
    return _product(torch.cat([left, -high, -low], -1), torch.cat([right, ones, ones], -1).mT, scale)


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · left · right, rounded once."""
    out = left.new_empty(len(left), left.shape[1], right.shape[2])
    return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)
