"""Promises of rlhf_ray.algorithms.advantages, against plain Python floats."""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.advantages import gae, shaped_rewards
from rlhf_ray.algorithms.errors import OptionError, SampleError, TensorInputError

number = st.floats(-10, 10)
ragged = st.lists(st.lists(st.tuples(number, number), min_size=1, max_size=12), max_size=8)  # samples of token pairs


def offsets_of(samples: list[list[tuple[float, float]]]) -> torch.Tensor:
    offsets = [0]
    for sample in samples:
        offsets.append(offsets[-1] + len(sample))
    return torch.tensor(offsets)


def column(samples: list[list[tuple[float, float]]], index: int) -> torch.Tensor:
    return torch.tensor([token[index] for sample in samples for token in sample], dtype=torch.float64)


def naive_gae(sample: list[tuple[float, float]], gamma: float, lam: float) -> list[float]:
    """The sum of the definition, not the recursion."""
    deltas = []
    for t, (reward, value) in enumerate(sample):
        next_value = sample[t + 1][1] if t + 1 < len(sample) else 0.0
        deltas.append(reward + gamma * next_value - value)
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(len(sample) - t)) for t in range(len(sample))]


@settings(deadline=None)
@given(ragged, st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_a_loop_in_float64(samples: list[list[tuple[float, float]]], gamma: float, lam: float) -> None:
    rewards, values = column(samples, 0), column(samples, 1)
    advantages, returns = gae(rewards, values, offsets_of(samples), gamma, lam)
    want = [a for sample in samples for a in naive_gae(sample, gamma, lam)]
    assert advantages.tolist() == pytest.approx(want, abs=1e-9)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(want, values.tolist(), strict=True)], abs=1e-9)


def test_gae_gives_hand_worked_values() -> None:
    rewards, values = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 1.0, 3.0])
    advantages, returns = gae(rewards, values, torch.tensor([0, 2, 3]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [1.25, 1.0, 1.0]  # deltas 1.0, 1.0 | 1.0
    assert returns.tolist() == [1.75, 2.0, 4.0]


@settings(deadline=None)
@given(ragged, st.floats(0, 1))
def test_lambda_one_gives_monte_carlo_returns(samples: list[list[tuple[float, float]]], gamma: float) -> None:
    _, returns = gae(column(samples, 0), column(samples, 1), offsets_of(samples), gamma, lam=1.0)
    want = []
    for sample in samples:
        for t in range(len(sample)):
            want.append(sum(gamma**k * reward for k, (reward, _) in enumerate(sample[t:])))
    assert returns.tolist() == pytest.approx(want, abs=1e-9)


@settings(deadline=None)
@given(ragged, st.floats(0, 1))
def test_lambda_zero_gives_one_step_differences(samples: list[list[tuple[float, float]]], gamma: float) -> None:
    advantages, _ = gae(column(samples, 0), column(samples, 1), offsets_of(samples), gamma, lam=0.0)
    padded = [[*sample, (0.0, 0.0)] for sample in samples]
    want = [r + gamma * s[t + 1][1] - v for s in padded for t, (r, v) in enumerate(s[:-1])]
    assert advantages.tolist() == pytest.approx(want, abs=1e-9)


@settings(deadline=None)
@given(ragged, st.randoms(use_true_random=False))
def test_a_sample_has_the_same_advantages_in_any_company(
    samples: list[list[tuple[float, float]]], random: Random
) -> None:
    alone = [gae(column([s], 0), column([s], 1), offsets_of([s]), 0.9, 0.8)[0].tolist() for s in samples]
    order = list(range(len(samples)))
    random.shuffle(order)
    mixed = [samples[i] for i in order]
    together, _ = gae(column(mixed, 0), column(mixed, 1), offsets_of(mixed), 0.9, 0.8)
    assert together.tolist() == [a for i in order for a in alone[i]]


def test_gae_keeps_float32_carries_no_gradient_and_leaves_its_inputs() -> None:
    rewards, values = torch.ones(5), torch.ones(5, requires_grad=True)
    advantages, returns = gae(rewards, values, torch.tensor([0, 3, 5]), 1.0, 0.95)
    assert advantages.dtype == returns.dtype == torch.float32
    assert not advantages.requires_grad
    assert not returns.requires_grad
    assert rewards.tolist() == values.tolist() == [1.0] * 5


def test_gae_stays_exact_over_long_responses_in_float32() -> None:
    rewards = torch.full((20_000,), 0.1)
    _, returns = gae(rewards, torch.zeros(20_000), torch.tensor([0, 20_000]), 1.0, 1.0)
    assert returns[0].item() == pytest.approx(20_000 * rewards[0].item(), rel=1e-7)


@settings(deadline=None)
@given(ragged, st.floats(0, 2))
def test_rewards_equal_a_loop_in_float64(samples: list[list[tuple[float, float]]], kl_coef: float) -> None:
    scores = torch.tensor([sample[0][1] for sample in samples], dtype=torch.float64)
    got = shaped_rewards(scores, column(samples, 0), offsets_of(samples), kl_coef)
    want = []
    for sample, score in zip(samples, scores.tolist(), strict=True):
        for t, (kl, _) in enumerate(sample):
            want.append(-kl_coef * kl + (score if t == len(sample) - 1 else 0.0))
    assert got.tolist() == pytest.approx(want, abs=1e-12)


def test_rewards_give_hand_worked_values() -> None:
    got = shaped_rewards(torch.tensor([3.0, -1.0]), torch.tensor([2.0, 4.0, 6.0]), torch.tensor([0, 2, 3]), 0.5)
    assert got.tolist() == [-1.0, 1.0, -4.0]


def test_rewards_leave_their_inputs() -> None:
    scores, kl = torch.tensor([3.0]), torch.tensor([2.0, 4.0])
    shaped_rewards(scores, kl, torch.tensor([0, 2]), 0.0)
    assert (scores.tolist(), kl.tolist()) == ([3.0], [2.0, 4.0])


def test_empty_samples_are_named() -> None:
    offsets = torch.tensor([0, 0, 2, 2])
    with pytest.raises(SampleError, match="positions 0, 2 have no response token") as raised:
        shaped_rewards(torch.zeros(3), torch.zeros(2), offsets, 0.1)
    assert raised.value.samples == [0, 2]
    with pytest.raises(SampleError, match="positions 0, 2"):
        gae(torch.zeros(2), torch.zeros(2), offsets, 1.0, 1.0)


def test_offsets_and_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TensorInputError, match=r"last value 2, but needs 0 and 3"):
        gae(torch.zeros(3), torch.zeros(3), torch.tensor([0, 2]), 1.0, 1.0)
    with pytest.raises(TensorInputError, match=r"first value 1"):
        gae(torch.zeros(3), torch.zeros(3), torch.tensor([1, 3]), 1.0, 1.0)
    with pytest.raises(TensorInputError, match=r"tensor offsets has .*int32"):
        gae(torch.zeros(3), torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32), 1.0, 1.0)
    with pytest.raises(TensorInputError, match="values"):
        gae(torch.zeros(3), torch.zeros(1), torch.tensor([0, 3]), 1.0, 1.0)
    with pytest.raises(TensorInputError, match="scores has length 1, but needs length 2"):
        shaped_rewards(torch.zeros(1), torch.zeros(3), torch.tensor([0, 1, 3]), 0.1)


@pytest.mark.parametrize(
    ("gamma", "lam", "name"), [(1.1, 1.0, "gamma"), (1.0, -0.1, "lam"), (float("nan"), 1, "gamma")]
)
def test_gamma_and_lambda_lie_between_zero_and_one(gamma: float, lam: float, name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} is"):
        gae(torch.zeros(3), torch.zeros(3), torch.tensor([0, 3]), gamma, lam)
