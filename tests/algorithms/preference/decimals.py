"""Formulas as the papers print them, in decimals of 28 digits: what overflows or cancels in floats does not here."""

from collections.abc import Callable
from decimal import Decimal

import torch
from hypothesis import strategies as st
from torch import Tensor

LOG_PROB = st.floats(-1e4, 1e4)
BETA = st.floats(1e-3, 2)
MAGNITUDES = (0.0, 1e-30, 1e-12, 1e-6, 0.1, 1.0, 30.0, 90.0, 1e4, 1e8, 1e15)
EXTREMES = [sign * size for size in MAGNITUDES for sign in (1, -1)]


def sigma(x: Decimal) -> Decimal:
    return 1 / (1 + (-x).exp())


def columns(rows: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    first, second = torch.tensor(rows, dtype=torch.float64).reshape(-1, 2).unbind(1)
    return first, second


def gradients(loss: Callable[..., Tensor], *columns: list[float], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Gradients of the summed loss, and before them the losses."""
    tensors = [torch.tensor(column, dtype=dtype, requires_grad=True) for column in columns]
    losses = loss(*tensors)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), tensors)]


def assert_finite_in_float32(loss: Callable[..., Tensor], *columns: list[float]) -> None:
    for found in gradients(loss, *columns, dtype=torch.float32):
        assert found.dtype == torch.float32
        assert found.shape == (len(columns[0]),)
        assert found.isfinite().all(), found
