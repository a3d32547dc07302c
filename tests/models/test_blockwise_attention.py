from typing import Any

import pytest
import torch

from rlhf_ray.models.blockwise_attention import causal_attention

SIZE = 16


def states(length: int, heads: int, kv_heads: int, sequences: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    """Query, key and value, `[sequences, length, heads, size]`."""
    random = torch.Generator().manual_seed(length + heads)
    return [
        torch.randn(sequences, length, number, SIZE, generator=random).to(dtype).requires_grad_()
        for number in (heads, kv_heads, kv_heads)
    ]


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """In float64, with the whole matrix of scores."""
    group = query.shape[2] // key.shape[2]
    q, k, v = (part.double().transpose(1, 2) for part in (query, key, value))
    k, v = (part.repeat_interleave(group, dim=1) for part in (k, v))
    length = query.shape[1]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = (scale * q @ k.mT).masked_fill(later, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2)


def with_gradients(attend: Any, parts: Any, scale: float) -> list[torch.Tensor]:
    out = attend(*parts, scale)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), parts)]


def assert_equals_what_is_written_out(parts: Any) -> None:
    for got, wanted in zip(
        with_gradients(causal_attention, parts, 0.3), with_gradients(written_out, parts, 0.3), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


# A block has 128 queries.
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 256, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (4, 1)])
def test_it_is_softmax_attention_with_its_gradients(length: int, heads: int, kv_heads: int) -> None:
    assert_equals_what_is_written_out(states(length, heads, kv_heads))


def test_values_may_have_another_size() -> None:
    query, key, value = states(140, heads=4, kv_heads=2)
    assert_equals_what_is_written_out((query, key, value[..., :5].detach().requires_grad_()))


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_bfloat16_keeps_its_digits_where_scores_are_large(factor: float) -> None:
    """Scores reach 5 and 40. Rounded to bfloat16, the larger ones would be off by a tenth, and so would be weights."""
    query, key, value = states(300, heads=6, kv_heads=2, dtype=torch.bfloat16)
    parts = ((query * factor).detach().requires_grad_(), key, value)
    found = zip(with_gradients(causal_attention, parts, 0.25), with_gradients(written_out, parts, 0.25), strict=True)
    errors = [float((got.double() - wanted).norm() / wanted.norm()) for got, wanted in found]
    assert max(errors) < 0.01


def test_what_comes_later_counts_for_nothing_however_large_it_is() -> None:
    query, key, value = states(200, heads=2, kv_heads=2, dtype=torch.bfloat16)
    with torch.no_grad():
        before = causal_attention(query, key, value, 0.25)
        for part in (key, value):
            part[:, 140:] *= 10_000
        after = causal_attention(query, key, value, 0.25)
    assert torch.equal(before[:, :140], after[:, :140])
    assert not torch.equal(before[:, 140:], after[:, 140:])


def test_scores_far_below_zero_are_as_good_as_others() -> None:
    """All scores of a row less the same: exp of them would be 0 in every format."""
    query, key, value = states(200, heads=2, kv_heads=2)
    query = torch.cat([query, torch.ones_like(query[..., :1])], -1).detach().requires_grad_()
    low, normal = (
        torch.cat([key, torch.full_like(key[..., :1], shift)], -1).detach().requires_grad_() for shift in (-3000.0, 0.0)
    )
    for got, wanted in zip(
        with_gradients(causal_attention, (query, low, value), 1.0)[::3],
        with_gradients(causal_attention, (query, normal, value), 1.0)[::3],
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_no_square_of_the_length_exists(recorder: Any) -> None:
    parts = states(2048, heads=2, kv_heads=1, sequences=1, dtype=torch.bfloat16)
    with recorder:
        causal_attention(*parts, 0.25).sum().backward()
    assert 0 < recorder.largest <= 2 * 128 * 2048
