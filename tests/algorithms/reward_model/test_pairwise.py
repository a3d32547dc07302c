"""Promises of the pairwise losses of reward models, against plain Python floats."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.errors import SampleError, TensorInputError
from rlhf_ray.algorithms.reward_model.pairwise import all_pairs_loss, bradley_terry_loss, centering_penalty
from rlhf_ray.algorithms.reward_model.rows import candidate_pairs

score = st.floats(-15, 15)
margin = st.floats(0, 3)
# A row: scores and ranks of its candidates.
row = st.lists(st.tuples(score, st.integers(0, 3)), min_size=2, max_size=5)


def wins(better: float, worse: float) -> float:
    """The probability of Bradley and Terry: strength over the sum of both strengths."""
    return math.exp(better) / (math.exp(better) + math.exp(worse))


def flat(rows: list[list[tuple[float, int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cells = [cell for row in rows for cell in row]
    scores = torch.tensor([cell[0] for cell in cells], dtype=torch.float64)
    ranks = torch.tensor([cell[1] for cell in cells], dtype=torch.int64)
    return scores, ranks, torch.tensor([0, *map(len, rows)]).cumsum(0)


@settings(deadline=None)
@given(st.lists(st.tuples(score, score, margin, st.booleans()), max_size=30))
def test_loss_equals_a_loop_in_float64(pairs: list[tuple[float, float, float, bool]]) -> None:
    numbers = torch.tensor([pair[:3] for pair in pairs], dtype=torch.float64).reshape(-1, 3)
    chosen, rejected, margins = numbers.unbind(1)
    tied = torch.tensor([pair[3] for pair in pairs], dtype=torch.bool)
    want = [
        -math.log(wins(c, r)) / 2 - math.log(wins(r, c)) / 2 if tie else -math.log(wins(c - m, r))
        for c, r, m, tie in pairs
    ]
    assert bradley_terry_loss(chosen, rejected, margins, tied).tolist() == pytest.approx(want, rel=1e-7, abs=1e-12)
    plain = [-math.log(wins(c, r)) for c, r, _, _ in pairs]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(plain, rel=1e-7, abs=1e-12)


def test_loss_has_hand_worked_values() -> None:
    log3 = math.log(3)
    chosen, rejected = torch.tensor([1.0, log3, 0.0]), torch.tensor([1.0, 0.0, log3])
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx([math.log(2), math.log(4 / 3), math.log(4)])
    # A margin of log 3 takes the lead of the second pair away, and makes it three to one against the first.
    margins = torch.full((3,), log3)
    want = [math.log(4), math.log(2), math.log(10)]
    assert bradley_terry_loss(chosen, rejected, margins).tolist() == pytest.approx(want)
    # Tied: the mean of log 4/3 and log 4, which is log(4 / sqrt 3), whichever of the two scores higher.
    ties = bradley_terry_loss(chosen, rejected, margins, torch.ones(3, dtype=torch.bool))
    assert ties.tolist() == pytest.approx([math.log(2), math.log(4 / math.sqrt(3)), math.log(4 / math.sqrt(3))])


def test_loss_stays_finite_for_extreme_scores() -> None:
    chosen, rejected = torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])
    assert bradley_terry_loss(chosen, rejected).tolist() == [0.0, 2e4]
    assert bradley_terry_loss(chosen, rejected, tied=torch.ones(2, dtype=torch.bool)).tolist() == [1e4, 1e4]


def test_descent_raises_the_chosen_and_lowers_the_rejected_score() -> None:
    chosen, rejected = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    bradley_terry_loss(chosen, rejected, torch.tensor([0.0, 1.0])).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    pull = 1 / (1 + math.exp(-1))
    assert chosen.grad.tolist() == pytest.approx([-0.5, -pull])
    assert rejected.grad.tolist() == pytest.approx([0.5, pull])


def test_descent_brings_tied_scores_together_and_leaves_equal_ones_alone() -> None:
    first, second = torch.tensor([1.0, 0.5], requires_grad=True), torch.tensor([0.0, 0.5], requires_grad=True)
    bradley_terry_loss(first, second, tied=torch.ones(2, dtype=torch.bool)).sum().backward()
    assert first.grad is not None
    assert second.grad is not None
    # d/dx of log(2 cosh(x / 2)) is tanh(x / 2) / 2
    assert first.grad.tolist() == pytest.approx([math.tanh(0.5) / 2, 0.0])
    assert second.grad.tolist() == pytest.approx([-math.tanh(0.5) / 2, 0.0])


def test_centring_is_the_square_of_the_sum() -> None:
    chosen, rejected = torch.tensor([2.0, 1.0, -3.0], requires_grad=True), torch.tensor([1.0, -1.0, 1.0])
    penalty = centering_penalty(chosen, rejected)
    assert penalty.tolist() == [9.0, 0.0, 4.0]
    penalty.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == [6.0, 0.0, -4.0]  # down, not at all, up


@settings(deadline=None)
@given(st.lists(row, max_size=8))
def test_all_pairs_equals_a_loop_over_pairs(rows: list[list[tuple[float, int]]]) -> None:
    want = []
    for cells in rows:
        losses = []
        for (s, rank), (t, other) in combinations(cells, 2):
            up, down = -math.log(wins(s, t)), -math.log(wins(t, s))
            losses.append((up + down) / 2 if rank == other else up if rank < other else down)
        want.append(sum(losses) / len(losses))
    assert all_pairs_loss(*flat(rows)).tolist() == pytest.approx(want, rel=1e-7, abs=1e-12)


def test_all_pairs_has_hand_worked_values() -> None:
    log3 = math.log(3)
    # best 3, middle 1, worst 1: 3/4, 3/4 and 1/2
    rows = [[(0.0, 2), (log3, 0), (0.0, 1)], [(0.0, 0), (0.0, 0)]]
    want = [(2 * math.log(4 / 3) + math.log(2)) / 3, math.log(2)]
    assert all_pairs_loss(*flat(rows)).tolist() == pytest.approx(want)


def test_all_pairs_of_two_is_bradley_terry() -> None:
    scores, ranks, offsets = flat([[(1.5, 0), (0.2, 1)], [(1.5, 1), (0.2, 0)], [(1.5, 0), (0.2, 0)]])
    chosen, rejected = torch.tensor([1.5, 0.2, 1.5]).double(), torch.tensor([0.2, 1.5, 0.2]).double()
    want = bradley_terry_loss(chosen, rejected, tied=torch.tensor([False, False, True]))
    torch.testing.assert_close(all_pairs_loss(scores, ranks, offsets), want)


def test_pairs_name_the_better_candidate_first() -> None:
    _, ranks, offsets = flat([[(0, 1), (0, 0)], [(0, 0), (0, 2), (0, 0)]])
    pairs = candidate_pairs(ranks, offsets)
    assert pairs.better.tolist() == [1, 2, 2, 4]
    assert pairs.worse.tolist() == [0, 3, 4, 3]
    assert pairs.tied.tolist() == [False, False, True, False]
    assert pairs.rows.tolist() == [0, 1, 1, 1]


def test_tensors_that_do_not_match_are_refused() -> None:
    with pytest.raises(TensorInputError, match="rejected"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(1))
    with pytest.raises(TensorInputError, match="margins"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(3), torch.zeros(1))
    with pytest.raises(TensorInputError, match="tied"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(3), tied=torch.zeros(3))
    with pytest.raises(TensorInputError, match="rejected"):
        centering_penalty(torch.zeros(3), torch.zeros(1))
    ranks, offsets = torch.tensor([0, 1, 0]), torch.tensor([0, 2, 3])
    with pytest.raises(SampleError, match="positions 1 have fewer than two candidates"):
        all_pairs_loss(torch.zeros(3), ranks, offsets)
    with pytest.raises(TensorInputError, match=r"offsets has first value 0 and last value 2, but needs 0 and 3"):
        all_pairs_loss(torch.zeros(3), ranks, torch.tensor([0, 2]))
    with pytest.raises(TensorInputError, match="scores has shape"):
        all_pairs_loss(torch.zeros(2), ranks, torch.tensor([0, 3]))
    with pytest.raises(TensorInputError, match="ranks has"):
        all_pairs_loss(torch.zeros(3), ranks.float(), torch.tensor([0, 3]))
