from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_ray.models.attention import _unshared, fused_attention, packed_attention
from rlhf_ray.platform import Attention, attention_of

SIZE = 8


def states(lengths: list[int], heads: int, kv_heads: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Query, key and value as transformers gives them, `[1, heads, tokens, size]`."""
    random = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    shapes = ((1, heads, tokens, SIZE), (1, kv_heads, tokens, SIZE), (1, kv_heads, tokens, SIZE))
    return tuple(torch.randn(shape, generator=random).requires_grad_() for shape in shapes)


def packed(parts: tuple[torch.Tensor, ...], lengths: list[int], scaling: float | None = None) -> torch.Tensor:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    out, _ = packed_attention(
        torch.nn.Identity(), *parts, None, scaling, cu_seq_lens_q=cu_seqlens, max_length_q=max(lengths)
    )
    return out


def padded(parts: tuple[torch.Tensor, ...], lengths: list[int], scaling: float | None = None) -> torch.Tensor:
    """Softmax attention in float64 over sequences padded to the longest, written out with its mask."""
    longest, starts = max(lengths), [sum(lengths[:i]) for i in range(len(lengths))]
    heads = parts[0].shape[1]
    query, key, value = (
        torch.stack(
            [
                torch.nn.functional.pad(part[0, :, start : start + length].double(), (0, 0, 0, longest - length))
                for start, length in zip(starts, lengths, strict=True)
            ]
        ).repeat_interleave(heads // part.shape[1], dim=1)
        for part in parts
    )
    place = torch.arange(longest)
    real = place < torch.tensor(lengths)[:, None]
    allowed = (place[:, None] >= place[None])[None, None] & real[:, None, None]
    scores = query @ key.transpose(2, 3) * (SIZE**-0.5 if scaling is None else scaling)
    out = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value
    return out.transpose(1, 2)[real][None]


def gradients(out: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((out * weight).sum(), parts)


def assert_equal(lengths: list[int], heads: int, kv_heads: int, scaling: float | None = None, seed: int = 0) -> None:
    parts = states(lengths, heads, kv_heads, seed)
    mine, wanted = packed(parts, lengths, scaling), padded(parts, lengths, scaling)
    torch.testing.assert_close(mine, wanted.float(), rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients(mine, parts), gradients(wanted, parts), strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    seed=st.integers(0, 99),
)
def test_packed_attention_equals_padded_attention(lengths: list[int], heads: tuple[int, int], seed: int) -> None:
    assert_equal(lengths, *heads, seed=seed)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    "lengths",
    [[16, 16, 16], [7], [1, 1], [30, 31, 32], [1, 2, 4, 9, 20, 64]],
    ids=["one length", "one sequence", "single tokens", "one bucket", "many buckets"],
)
def test_every_way_of_batching_equals_padded_attention(lengths: list[int], kv_heads: int) -> None:
    assert_equal(lengths, heads=4, kv_heads=kv_heads)


@pytest.mark.parametrize("lengths", [[5, 9], [6, 6]], ids=["several lengths", "one length"])
def test_the_models_own_scaling_is_used(lengths: list[int]) -> None:
    assert_equal(lengths, heads=2, kv_heads=1, scaling=0.3)


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [1, 2, 3, 5, 8, 130, 128], [70] * 5], ids=str)
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_bfloat16_equals_padded_attention(lengths: list[int], scaling: float | None) -> None:
    parts = tuple(part.detach().bfloat16().requires_grad_() for part in states(lengths, heads=4, kv_heads=2, seed=1))
    mine, wanted = packed(parts, lengths, scaling), padded(parts, lengths, scaling)
    pairs = [(mine, wanted), *zip(gradients(mine, parts), gradients(wanted, parts), strict=True)]
    for got, want in pairs:
        assert got.dtype == torch.bfloat16
        assert (got - want).norm() < 0.01 * want.norm()


def test_a_sequence_does_not_see_its_neighbours() -> None:
    parts = states([6, 6, 6], heads=2, kv_heads=2, seed=1)
    before = packed(parts, [6, 6, 6]).detach()
    with torch.no_grad():
        for part in parts:
            part[:, :, 6:12] = 100.0
    after = packed(parts, [6, 6, 6])
    assert torch.equal(before[:, :6], after[:, :6])
    assert torch.equal(before[:, 12:], after[:, 12:])
    assert not torch.equal(before[:, 6:12], after[:, 6:12])


@pytest.mark.parametrize("lengths", [[2048], [512] * 4, [1000, 900, 100, 40, 8]], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_no_square_of_the_length_exists(lengths: list[int], kv_heads: int, recorder: Any) -> None:
    parts = states(lengths, heads=4, kv_heads=kv_heads, seed=0)
    with recorder:
        packed(parts, lengths).sum().backward()
    assert 0 < recorder.largest <= 2 * parts[0].numel() < max(lengths) ** 2


def test_a_sliding_window_that_would_bind_is_refused() -> None:
    parts = states([6], heads=1, kv_heads=1, seed=0)
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32)

    def attend(window: int) -> None:
        packed_attention(
            torch.nn.Identity(), *parts, None, cu_seq_lens_q=cu_seqlens, max_length_q=6, sliding_window=window
        )

    attend(window=6)
    with pytest.raises(NotImplementedError, match="window of 5 tokens.* sequence of 6"):
        attend(window=5)


# Own tokens of each sequence, and its prefix within the pack as start and length.
SHARED = [(7, (0, 0)), (2, (0, 4)), (3, (0, 7)), (5, (0, 0)), (1, (12, 2)), (6, (12, 5))]


def test_a_shared_prefix_is_attended_to_as_if_each_sequence_had_its_own() -> None:
    lengths, prefixes = [own for own, _ in SHARED], tuple(prefix for _, prefix in SHARED)
    parts = states(lengths, heads=4, kv_heads=2, seed=3)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    mine, _ = packed_attention(
        torch.nn.Identity(), *parts, None, None, cu_seq_lens_q=cu_seqlens, max_length_q=11, shared_prefixes=prefixes
    )
    shared = _unshared(tuple(cu_seqlens.tolist()), prefixes)
    places, own, starts = shared.rows, shared.own, shared.cu_seqlens
    whole = [own + length for own, (_, length) in SHARED]
    assert starts.tolist() == [0, *torch.tensor(whole).cumsum(0).tolist()]
    assert places[own].tolist() == list(range(sum(lengths)))
    wanted = padded(tuple(part[:, :, places] for part in parts), whole)[:, own]
    torch.testing.assert_close(mine, wanted.float(), rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients(mine, parts), gradients(wanted, parts), strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefixes", [None, ((0, 0), (0, 2))])
def test_layers_read_once_where_sequences_start(
    prefixes: tuple[tuple[int, int], ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = states([5, 4], heads=2, kv_heads=1, seed=0)
    starts, read, others = torch.tensor([0, 5, 9], dtype=torch.int32), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (read.append(tensor), others(tensor))[1])
    for _ in range(3):
        packed_attention(
            torch.nn.Identity(), *parts, None, cu_seq_lens_q=starts, max_length_q=6, shared_prefixes=prefixes
        )
    assert sum(tensor is starts for tensor in read) == 1


@pytest.mark.parametrize(
    ("device", "dtype", "kernel"),
    [
        ("cuda", torch.bfloat16, "varlen_flash"),
        ("cuda", torch.float32, "bucketed"),
        ("cpu", torch.bfloat16, "bucketed"),
        ("cpu", torch.float32, "bucketed"),
    ],
)
def test_no_flash_kernel_gets_float32(device: str, dtype: torch.dtype, kernel: Attention) -> None:
    assert attention_of(device, dtype) == kernel


def test_groups_of_queries_on_a_gpu_have_keys_of_their_own_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], bool]] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def record(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
        seen.append((tuple(key.shape), how["enable_gqa"]))
        return fused(query, key, value, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    with FakeTensorMode():
        query, key = (torch.empty(2, 16, heads, 64, device="cuda") for heads in (8, 2))
        assert fused_attention(query, key, key).shape == query.shape
    assert seen == [((2, 8, 16, 64), False)]
