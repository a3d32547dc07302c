"""Causal attention over packed sequences, registered with transformers under one name.

On GPU it is PyTorch's variable-length flash attention, whose kernels take formats of 16 bits alone. On CPU, and on
GPU in float32, sequences of similar length are brought into one batch, padded at their ends: under a causal mask no
real query sees the padding, so no mask of lengths is built. PyTorch's fused kernels take it in float32,
`blockwise_attention` on CPU in bfloat16, all without an L×L matrix.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface

from rlhf_ray.models.blockwise_attention import causal_attention
from rlhf_ray.models.sequence_parallel import SequenceParallel
from rlhf_ray.platform import Attention, attention_of

PACKED_ATTENTION = "rlhf_ray_packed"

Prefixes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Buckets:
    """Sequences of similar length side by side, each bucket attending in one batch.

    Attributes:
        rows: for each bucket, int64 `[sequences * length]`, token of each place; places past a sequence's end repeat
            its last token.
        lengths: length of each bucket's sequences.
        places: int64 `[tokens]`, the place of each token in its own sequence, all buckets end to end.
    """

    rows: list[torch.Tensor]
    lengths: list[int]
    places: torch.Tensor

    def to(self, device: torch.device) -> "_Buckets":
        """With the tensors on a device."""
        return _Buckets([rows.to(device) for rows in self.rows], self.lengths, self.places.to(device))


@dataclass(frozen=True)
class _Unshared:
    """Whole sequences one after the other, their prefixes repeated.

    Attributes:
        rows: int64, the token of each place.
        own: int64 `[tokens]`, the places of the sequences' own tokens.
        cu_seqlens: int32 `[sequences + 1]`, where each sequence starts.
    """

    rows: torch.Tensor
    own: torch.Tensor
    cu_seqlens: torch.Tensor

    def to(self, device: torch.device) -> "_Unshared":
        """With the tensors on a device."""
        return _Unshared(self.rows.to(device), self.own.to(device), self.cu_seqlens.to(device))


_Layout = TypeVar("_Layout", _Buckets, _Unshared)
_layouts = WeakIdKeyDictionary()


# States are gathered by index_select: plain indexing does the same, on CPU with a several times slower backward pass.
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
    shared_prefixes: Prefixes | None = None,
    sequence_parallel: SequenceParallel | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of each token to the tokens before it in its own sequence, and to those of the sequence's prefix.

    Args:
        query: `[1, heads, tokens, head size]`; `key` and `value` may have fewer heads (grouped queries).
        cu_seq_lens_q: int32 `[sequences + 1]`.
        shared_prefixes: `PackedSequences.prefixes`.
        sequence_parallel: the ranks that share the pack; states are then of this rank's slice of its tokens.

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
    if sequence_parallel is not None:
        query, key, value = sequence_parallel.to_heads(query, key, value)
    attention: Attention = attention_of(query.device.type, query.dtype)
    if attention == "varlen_flash":
        out = _varlen(query, key, value, cu_seq_lens_q, max_length_q, shared_prefixes, scaling)
    else:
        out = _bucketed(query, key, value, cu_seq_lens_q, shared_prefixes, scaling)
    if sequence_parallel is not None:
        out = sequence_parallel.to_tokens(out)
    return out[None], None


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_length: int,
    prefixes: Prefixes | None,
    scaling: float | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    shared = None
    if prefixes is not None:
        shared = _layout_of(cu_seqlens, prefixes, _unshared)
        query, key, value = (states.index_select(0, shared.rows) for states in (query, key, value))
        cu_seqlens = shared.cu_seqlens
    out: torch.Tensor = varlen_attn(  # type: ignore[assignment]
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_length,
        max_length,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out if shared is None else out.index_select(0, shared.own)


def _layout_of(
    cu_seqlens: torch.Tensor,
    prefixes: Prefixes | None,
    make: Callable[[tuple[int, ...], Prefixes | None], _Layout],
) -> _Layout:
    """What `make` gives of a pack, on its device; made for the first layer, and kept as long as the pack is.

    All layers are given the same tensor of starts. To read it from a GPU is to wait for all that the GPU was given.
    """
    known = _layouts.get(cu_seqlens)
    if known is None or known[:2] != (make, prefixes):
        layout = make(tuple(cu_seqlens.tolist()), prefixes).to(cu_seqlens.device)
        known = _layouts[cu_seqlens] = (make, prefixes, layout)
    found: _Layout = known[2]
    return found


@lru_cache(maxsize=64)
def _unshared(cu_seqlens: tuple[int, ...], prefixes: Prefixes | None) -> _Unshared:
    assert prefixes is not None
    places = [_places(*span, *prefix) for span, prefix in zip(pairwise(cu_seqlens), prefixes, strict=True)]
    own = [torch.arange(len(whole)) >= length for whole, (_, length) in zip(places, prefixes, strict=True)]
    starts = torch.tensor([0, *map(len, places)]).cumsum(0).to(torch.int32)
    return _Unshared(torch.cat(places), torch.cat(own).nonzero()[:, 0], starts)


def _places(start: int, end: int, prefix_start: int, prefix_length: int) -> torch.Tensor:
    """Tokens of one whole sequence."""
    return torch.cat([torch.arange(prefix_start, prefix_start + prefix_length), torch.arange(start, end)])


def _bucketed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    prefixes: Prefixes | None,
    scaling: float | None,
) -> torch.Tensor:
    buckets = _layout_of(cu_seqlens, prefixes, _buckets)
    parts = []
    for rows, length in zip(buckets.rows, buckets.lengths, strict=True):
        q, k, v = (states.index_select(0, rows).unflatten(0, (-1, length)) for states in (query, key, value))
        parts.append(_causal(q, k, v, scaling).flatten(0, 1))
    return torch.cat(parts).index_select(0, buckets.places)


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """`[sequences, length, heads, size]`, as its arguments."""
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return causal_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return fused_attention(query, key, value, scaling)


def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None = None
) -> torch.Tensor:
    """What `blockwise_attention.causal_attention` computes, by PyTorch's own kernel."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.device.type == "cuda":
        # Of the kernels for float32 on GPUs, the one that takes groups of queries builds the L×L matrix.
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        groups = 1
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1)
    return out.transpose(1, 2)


@lru_cache(maxsize=64)
def _buckets(cu_seqlens: tuple[int, ...], prefixes: Prefixes | None) -> _Buckets:
    """Group sequences whose lengths differ by at most a quarter, so that little of a batch is padding."""
    spans = list(pairwise(cu_seqlens))
    by_size: dict[int, list[tuple[torch.Tensor, int]]] = {}
    for span, prefix in zip(spans, prefixes or [(0, 0)] * len(spans), strict=True):
        whole = _places(*span, *prefix)
        by_size.setdefault(math.ceil(math.log(len(whole), 1.25)), []).append((whole, prefix[1]))
    rows, lengths = [], []
    places, end = torch.empty(cu_seqlens[-1], dtype=torch.int64), 0
    for sequences in by_size.values():
        length = max(len(whole) for whole, _ in sequences)
        for whole, before in sequences:
            places[whole[before:]] = torch.arange(end + before, end + len(whole))
            end += length
        rows.append(torch.cat([whole[torch.arange(length).clamp(max=len(whole) - 1)] for whole, _ in sequences]))
        lengths.append(length)
    return _Buckets(rows, lengths, places)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
