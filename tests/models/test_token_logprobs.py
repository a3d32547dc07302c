from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.models import token_logprobs
from rlhf_ray.models.token_logprobs import Beside, TokenLogProbs


def case(
    positions: int, vocab: int, hidden: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, vocabulary head, targets, and the gradients of log-probs and entropies."""
    random = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(hidden, vocab, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocab, hidden, generator=random))
    states = torch.randn(positions, hidden, generator=random).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (positions,), generator=random)
    return states, head, targets, torch.randn(positions, generator=random), torch.randn(positions, generator=random)


def naive(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits at once, in float64."""
    log_p = (states.double() @ weight.double().T / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def results(
    states: torch.Tensor,
    weight: torch.Tensor,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    by_logprobs: torch.Tensor,
    by_entropy: torch.Tensor,
) -> list[torch.Tensor]:
    """Values and gradients, as float32."""
    loss = (logprobs * by_logprobs).sum() + (entropy * by_entropy).sum()
    found = [logprobs, entropy, *torch.autograd.grad(loss, (states, weight))]
    return [tensor.detach().float() for tensor in found]


@settings(deadline=None, max_examples=40)
@given(
    positions=st.integers(1, 20),
    vocab=st.integers(2, 30),
    hidden=st.integers(1, 6),
    chunk=st.integers(1, 25),
    temperature=st.sampled_from([1.0, 0.7, 1.6]),
    seed=st.integers(0, 999),
)
def test_values_and_gradients_equal_those_of_all_logits_at_once(
    positions: int, vocab: int, hidden: int, chunk: int, temperature: float, seed: int
) -> None:
    states, head, targets, *upstream = case(positions, vocab, hidden, seed)
    mine = TokenLogProbs(head, chunk)(states, targets, temperature)
    wanted = naive(states, head.weight, targets, temperature)
    for got, want in zip(
        results(states, head.weight, *mine, *upstream), results(states, head.weight, *wanted, *upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("chunk", [3, 64])
def test_a_loss_without_entropy_has_the_right_gradient(chunk: int) -> None:
    states, head, targets, upstream, _ = case(10, 13, 4, seed=0)
    logprobs, _ = TokenLogProbs(head, chunk)(states, targets, 0.8)
    wanted, _ = naive(states, head.weight, targets, 0.8)
    got = torch.autograd.grad((logprobs * upstream).sum(), (states, head.weight))
    want = torch.autograd.grad((wanted * upstream).sum(), (states, head.weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 64])
def test_the_collision_log_prob_is_measured_without_changing_value_or_gradient(chunk: int) -> None:
    states, head, targets, upstream, _ = case(10, 13, 4, seed=2)
    logprobs, collision = TokenLogProbs(head, chunk)(states, targets, 0.8, "collision")
    p = (states.double() @ head.weight.double().T / 0.8).softmax(-1)
    torch.testing.assert_close(collision, (p**2).sum(-1).log().float(), rtol=1e-5, atol=1e-5)
    assert not collision.requires_grad
    wanted, nothing = TokenLogProbs(head, chunk)(states, targets, 0.8, "nothing")
    assert len(nothing) == 0
    assert logprobs.equal(wanted)
    got, want = (torch.autograd.grad((values * upstream).sum(), states)[0] for values in (logprobs, wanted))
    assert got.equal(want)


def test_float64_gradients_pass_a_finite_difference_check() -> None:
    states, head, targets, *upstream = case(4, 7, 3, seed=5)
    weight = head.weight.detach().double()
    states = states.detach().double()

    def loss(hidden: torch.Tensor) -> float:
        logprobs, entropy = naive(hidden, weight, targets, 0.7)
        return float((logprobs * upstream[0]).sum() + (entropy * upstream[1]).sum())

    inputs = states.float().requires_grad_()
    logprobs, entropy = TokenLogProbs(head, 2)(inputs, targets, 0.7)
    ((logprobs * upstream[0]).sum() + (entropy * upstream[1]).sum()).backward()
    assert inputs.grad is not None
    step = 1e-5
    for place in range(states.numel()):
        nudge = torch.zeros_like(states).view(-1)
        nudge[place] = step
        slope = (loss(states + nudge.view_as(states)) - loss(states - nudge.view_as(states))) / (2 * step)
        assert inputs.grad.view(-1)[place].item() == pytest.approx(slope, abs=1e-4)


def test_bfloat16_is_close_to_float64_and_gives_float32() -> None:
    states, head, targets, *upstream = case(50, 40, 8, seed=3, dtype=torch.bfloat16)
    mine = TokenLogProbs(head, 16)(states, targets, 1.0)
    assert [out.dtype for out in mine] == [torch.float32, torch.float32]
    wanted = naive(states, head.weight, targets, 1.0)
    for got, want in zip(
        results(states, head.weight, *mine, *upstream), results(states, head.weight, *wanted, *upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0.03, atol=0.06)


def test_bfloat16_weight_gradients_do_not_lose_small_chunks() -> None:
    """4096 equal contributions: a running sum in bfloat16 would stand still at 256 of them."""
    head = torch.nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    torch.nn.init.zeros_(head.weight)
    states = torch.ones(4096, 1, dtype=torch.bfloat16)
    logprobs, _ = TokenLogProbs(head, 1)(states, torch.zeros(4096, dtype=torch.int64), 1.0)
    [gradient] = torch.autograd.grad(logprobs.sum(), head.weight)
    assert gradient[:, 0].tolist() == [2048.0, -2048.0]


def test_no_positions_give_nothing_and_a_gradient_of_zero() -> None:
    """The dummy micro-batch of a rank that has no samples left."""
    states, head, targets, *_ = case(0, 7, 3, seed=0)
    logprobs, entropy = TokenLogProbs(head, 4)(states, targets, 1.0)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


@pytest.mark.parametrize("entropy_counts", [True, False])
def test_the_logits_of_all_positions_never_exist(entropy_counts: bool, recorder: Any) -> None:
    positions, vocab, hidden, chunk = 2000, 300, 16, 50
    states, head, targets, *_ = case(positions, vocab, hidden, seed=0)
    with recorder:
        logprobs, entropy = TokenLogProbs(head, chunk)(states, targets, 0.9)
        (logprobs.sum() + (entropy.sum() if entropy_counts else 0)).backward()
    assert 0 < recorder.largest <= max(chunk * vocab, positions * hidden)


def test_blocks_are_as_wide_as_tiles_of_the_device_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    widths, within = [], token_logprobs._within
    monkeypatch.setattr(
        token_logprobs,
        "_within",
        lambda block, targets: (widths.append(block.stop - block.start), within(block, targets))[1],
    )
    states, head, targets, *_ = case(100, 1000, 4, seed=0)
    for chunk in (45, 11):
        TokenLogProbs(head, chunk)(states, targets, 1.0)
    assert widths == [384, 384, 232, *[110] * 9, 10]


@settings(deadline=None, max_examples=30)
@given(
    positions=st.integers(0, 20),
    ids=st.integers(2, 30),
    padding=st.integers(0, 20),
    chunk=st.integers(1, 25),
    beside=st.sampled_from(["entropy", "collision", "nothing"]),
    seed=st.integers(0, 999),
)
def test_rows_that_no_token_has_are_as_if_they_were_not_there(
    positions: int, ids: int, padding: int, chunk: int, beside: Beside, seed: int
) -> None:
    """Values and gradients to the last bit, and a gradient of 0 for those rows."""
    states, head, targets, *upstream = case(positions, ids, 5, seed)
    padded = torch.nn.Linear(5, ids + padding, bias=False)
    with torch.no_grad():
        padded.weight.copy_(torch.cat([head.weight, 100 * torch.ones(padding, 5)]))
    found = []
    for linear, token_ids in ((head, None), (head, ids + padding), (padded, ids)):
        logprobs, second = TokenLogProbs(linear, chunk, token_ids)(states, targets, 0.8, beside)
        loss = (logprobs * upstream[0]).sum() + ((second * upstream[1]).sum() if beside == "entropy" else 0)
        found.append((logprobs, second, *torch.autograd.grad(loss, (states, linear.weight))))
    (*mine, by_rows), *others = found
    for *theirs, by_their_rows in others:
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert torch.equal(by_rows, by_their_rows[:ids])
        assert not by_their_rows[ids:].any()
