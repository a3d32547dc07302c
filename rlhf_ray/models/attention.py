"""Causal attention over packed sequences, registered with transformers under one name.

On GPU it is PyTorch's variable-length flash attention. On CPU sequences of similar length are brought into
one batch, padded at their ends: under a causal mask no real query sees the padding, so no mask is built at
all and PyTorch's fused kernel runs without an L×L matrix.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from rlhf_ray.platform import platform

PACKED_ATTENTION = "rlhf_ray_packed"


@dataclass(frozen=True)
class _Bucket:
    """Sequences that attend in one batch.

    Attributes:
        rows: int64 `[sequences, length]`, token of each place; places past a sequence's end repeat its last token.
        real: bool `[sequences, length]`, places that hold a token of their own.
        tokens: int64 `[real places]`, where their results go.
    """

    rows: torch.Tensor
    real: torch.Tensor
    tokens: torch.Tensor


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of each token to the tokens before it in its own sequence.

    Args:
        query: `[1, heads, tokens, head size]`; `key` and `value` may have fewer heads (grouped queries).
        cu_seq_lens_q: int32 `[sequences + 1]`.

    Returns:
        `[1, tokens, heads, head size]`, and None for the weights.
    """
    window = kwargs.get("sliding_window")
    if window is not None and int(str(window)) < max_length_q:
        raise NotImplementedError(
            f"this model attends within a sliding window of {window} tokens, shorter than a packed sequence of "
            f"{max_length_q}: shorten the sequences or choose a model with full attention"
        )
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("this model has attention sinks, which packed attention here does not compute")
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # [tokens, heads, size]
    if platform().attention == "varlen_flash":
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            query,
            key,
            value,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.unsqueeze(0), None  # type: ignore[union-attr]
    return _bucketed(query, key, value, cu_seq_lens_q, scaling)[None], None


def _bucketed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    buckets = _buckets(tuple(cu_seqlens.tolist()))
    gqa = query.shape[1] != key.shape[1]
    if len(buckets) == 1 and bool(buckets[0].real.all()):  # one length: the batch is a view
        shape = buckets[0].rows.shape
        q, k, v = (states.unflatten(0, shape).transpose(1, 2) for states in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
        return out.transpose(1, 2).flatten(0, 1)
    parts = []
    for bucket in buckets:
        q, k, v = (states[bucket.rows].transpose(1, 2) for states in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
        parts.append(out.transpose(1, 2)[bucket.real])
    back = torch.empty(query.shape[0], dtype=torch.int64)
    back[torch.cat([bucket.tokens for bucket in buckets])] = torch.arange(query.shape[0])
    return torch.cat(parts)[back]


@lru_cache(maxsize=64)
def _buckets(cu_seqlens: tuple[int, ...]) -> list[_Bucket]:
    """Group sequences whose lengths differ by at most a quarter, so that little of a batch is padding."""
    by_size: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(cu_seqlens):
        by_size.setdefault(math.ceil(math.log(end - start, 1.25)), []).append((start, end))
    buckets = []
    for spans in by_size.values():
        starts = torch.tensor([start for start, _ in spans])[:, None]
        lengths = torch.tensor([end - start for start, end in spans])[:, None]
        place = torch.arange(int(lengths.max()))[None]
        real = place < lengths
        rows = starts + torch.minimum(place, lengths - 1)
        buckets.append(_Bucket(rows, real, rows[real]))
    return buckets


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
