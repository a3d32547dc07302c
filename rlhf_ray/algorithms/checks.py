"""Checks of flat batches that the public functions share."""

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


def lengths_from_offsets(offsets: Tensor, tokens: int) -> Tensor:
    """Lengths `[samples]` of the samples that offsets `[samples + 1]` cut out of `tokens` tokens.

    Raises `TensorInputError` when offsets do not run from 0 to `tokens`, `SampleError` when a sample is empty.
    """
    if offsets.dim() != 1 or offsets.numel() < 1 or offsets.dtype != torch.int64:
        raise TensorInputError("offsets", f"shape {tuple(offsets.shape)} and {offsets.dtype}", "int64 [samples + 1]")
    first, last = int(offsets[0]), int(offsets[-1])
    if (first, last) != (0, tokens):
        raise TensorInputError("offsets", f"first value {first} and last value {last}", f"0 and {tokens} (the tokens)")
    lengths = offsets.diff()
    check_lengths(lengths)
    return lengths


def check_option(name: str, value: float, allowed: bool, expected: str) -> None:
    """Raise `OptionError` unless `allowed`; write the condition so that NaN fails it."""
    if not allowed:
        raise OptionError(name, value, expected)
