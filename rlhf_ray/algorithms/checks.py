"""Checks of flat batches that the public functions share."""

import math

import torch
from torch import Tensor

from rlhf_ray.algorithms.errors import OptionError, SampleError, TensorInputError


def check_vectors(**tensors: Tensor) -> None:
    """All tensors are floating, of one dimension and of the same length as the first."""
    first = ""
    for name, tensor in tensors.items():
        first = first or name
        expected = tensors[first].numel()
        if tensor.dim() != 1 or tensor.numel() != expected:
            needed = f"one dimension of length {expected}, as {first}" if name != first else "one dimension"
            raise TensorInputError(name, f"shape {tuple(tensor.shape)}", needed)
        if not tensor.is_floating_point():
            raise TensorInputError(name, f"dtype {tensor.dtype}", "a floating dtype")


def check_lengths(lengths: Tensor) -> None:
    """Lengths are int64 `[samples]` and at least 1."""
    if lengths.dim() != 1 or lengths.dtype != torch.int64:
        raise TensorInputError("lengths", f"shape {tuple(lengths.shape)} and {lengths.dtype}", "int64 [samples]")
    if bool((lengths < 1).any()):
        empty = torch.nonzero(lengths < 1).flatten().tolist()
        raise SampleError(empty, "have no response token", "drop them, with the reason, before this step")


def check_like(name: str, tensor: Tensor, like: Tensor, dtype: torch.dtype) -> None:
    """A tensor is of this dtype and of the shape of another."""
    if tensor.shape != like.shape or tensor.dtype != dtype:
        found = f"shape {tuple(tensor.shape)} and {tensor.dtype}"
        raise TensorInputError(name, found, f"shape {tuple(like.shape)} and {dtype}")


def lengths_from_offsets(offsets: Tensor, tokens: int) -> Tensor:
    """Lengths `[samples]` of the samples that offsets `[samples + 1]` cut out of `tokens` tokens.

    Raises `TensorInputError` when offsets do not run from 0 to `tokens`, `SampleError` when a sample is empty.
    """
    lengths = parts_from_offsets(offsets, tokens, "tokens", "samples")
    check_lengths(lengths)
    return lengths


def parts_from_offsets(offsets: Tensor, total: int, items: str, parts: str) -> Tensor:
    """As above, of parts of any length: `items` and `parts` are what an error calls them."""
    if offsets.dim() != 1 or offsets.numel() < 1 or offsets.dtype != torch.int64:
        raise TensorInputError("offsets", f"shape {tuple(offsets.shape)} and {offsets.dtype}", f"int64 [{parts} + 1]")
    first, last = int(offsets[0]), int(offsets[-1])
    if (first, last) != (0, total):
        raise TensorInputError("offsets", f"first value {first} and last value {last}", f"0 and {total} (the {items})")
    return offsets.diff()


def check_option(name: str, value: float, allowed: bool, expected: str) -> None:
    """Raise `OptionError` unless `allowed`; write the condition so that NaN fails it."""
    if not allowed:
        raise OptionError(name, value, expected)


def check_positive(name: str, value: float) -> None:
    """Raise `OptionError` unless value is above 0 and finite."""
    check_option(name, value, 0 < value < math.inf, "above 0 and finite")
