"""Promises of the listwise losses of reward models, against plain Python floats and against enumeration."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.errors import SampleError
from rlhf_ray.algorithms.reward_model.listwise import plackett_luce_loss, softmax_loss
from rlhf_ray.algorithms.reward_model.pairwise import bradley_terry_loss

score = st.floats(-10, 10)
# A row: scores and ranks of its candidates.
row = st.lists(st.tuples(score, st.integers(0, 3)), min_size=2, max_size=5)


def flat(rows: list[list[tuple[float, int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cells = [cell for row in rows for cell in row]
    scores = torch.tensor([cell[0] for cell in cells], dtype=torch.float64)
    ranks = torch.tensor([cell[1] for cell in cells], dtype=torch.int64)
    return scores, ranks, torch.tensor([0, *map(len, rows)]).cumsum(0)


def chance(chosen: float, among: list[float]) -> float:
    return math.exp(chosen) / sum(math.exp(s) for s in among)


@settings(deadline=None)
@given(st.lists(row, max_size=8))
def test_softmax_equals_a_loop_in_float64(rows: list[list[tuple[float, int]]]) -> None:
    want = []
    for cells in rows:
        top = min(rank for _, rank in cells)
        losses = [-math.log(chance(s, [s for s, _ in cells])) for s, rank in cells if rank == top]
        want.append(sum(losses) / len(losses))
    assert softmax_loss(*flat(rows)).tolist() == pytest.approx(want, rel=1e-7, abs=1e-12)


@settings(deadline=None)
@given(st.lists(row, max_size=8))
def test_plackett_luce_equals_a_loop_in_float64(rows: list[list[tuple[float, int]]]) -> None:
    want = []
    for cells in rows:
        loss = 0.0
        for s, rank in cells:
            loss -= math.log(chance(s, [t for t, other in cells if other >= rank]))
        want.append(loss)
    assert plackett_luce_loss(*flat(rows)).tolist() == pytest.approx(want, rel=1e-7, abs=1e-10)


@pytest.mark.parametrize("scores", [[0.3, -1.2, 2.0, 0.0], [1.0, 1.0, 1.0], [4.0, -4.0]])
def test_plackett_luce_is_a_distribution_over_rankings(scores: list[float]) -> None:
    """Enumerated: each ranking's probability is that of drawing it one by one, and all of them make 1."""
    total, first = 0.0, [0.0] * len(scores)
    for order in permutations(range(len(scores))):
        ranks = [order.index(candidate) for candidate in range(len(scores))]
        loss = plackett_luce_loss(*flat([list(zip(scores, ranks, strict=True))])).item()
        drawn, left = 1.0, list(order)
        while left:
            drawn *= chance(scores[left[0]], [scores[c] for c in left])
            left.pop(0)
        assert math.exp(-loss) == pytest.approx(drawn)
        total += math.exp(-loss)
        first[order[0]] += math.exp(-loss)
    assert total == pytest.approx(1)
    # Who comes first is Ziegler's softmax.
    for candidate, share in enumerate(first):
        ranks = [int(other != candidate) for other in range(len(scores))]
        assert softmax_loss(*flat([list(zip(scores, ranks, strict=True))])).item() == pytest.approx(-math.log(share))


@settings(deadline=None)
@given(st.lists(st.tuples(score, score), min_size=1, max_size=8))
def test_two_candidates_are_bradley_terry(pairs: list[tuple[float, float]]) -> None:
    chosen, rejected = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    want = bradley_terry_loss(chosen, rejected)
    in_order, reversed_order = [[(c, 0), (r, 1)] for c, r in pairs], [[(r, 1), (c, 0)] for c, r in pairs]
    for rows in (in_order, reversed_order):
        torch.testing.assert_close(softmax_loss(*flat(rows)), want)
        torch.testing.assert_close(plackett_luce_loss(*flat(rows)), want)
    ties = flat([[(c, 0), (r, 0)] for c, r in pairs])
    half = bradley_terry_loss(chosen, rejected, tied=torch.ones(len(pairs), dtype=torch.bool))
    torch.testing.assert_close(softmax_loss(*ties), half)
    torch.testing.assert_close(plackett_luce_loss(*ties), 2 * half)


def test_losses_have_hand_worked_values() -> None:
    log2, log3 = math.log(2), math.log(3)
    # strengths 3, 2, 1; chosen first: 3/6, then 2/3, then 1
    rows = [[(log2, 1), (0.0, 2), (log3, 0)]]
    assert softmax_loss(*flat(rows)).tolist() == pytest.approx([math.log(2)])
    assert plackett_luce_loss(*flat(rows)).tolist() == pytest.approx([math.log(3)])
    # 3 and 2 tied as best, each chosen from all: 3/6 and 2/6, then 1
    tied = [[(log2, 0), (0.0, 1), (log3, 0)]]
    assert softmax_loss(*flat(tied)).tolist() == pytest.approx([(math.log(2) + math.log(3)) / 2])
    assert plackett_luce_loss(*flat(tied)).tolist() == pytest.approx([math.log(2) + math.log(3)])
    # equal scores: log k, and log k!
    even = [[(1.0, 3), (1.0, 1), (1.0, 0), (1.0, 2)]]
    assert softmax_loss(*flat(even)).tolist() == pytest.approx([math.log(4)])
    assert plackett_luce_loss(*flat(even)).tolist() == pytest.approx([math.log(24)])


def test_losses_do_not_depend_on_the_other_rows() -> None:
    rows = [[(0.1, 0), (0.9, 1)], [(2.0, 2), (1.0, 0), (0.0, 1), (-1.0, 2)], [(0.5, 1), (0.5, 0), (1.5, 2)]]
    for loss in (softmax_loss, plackett_luce_loss):
        together = loss(*flat(rows))
        alone = torch.cat([loss(*flat([cells])) for cells in rows])
        torch.testing.assert_close(together, alone)


def test_losses_stay_finite_for_extreme_scores() -> None:
    rows = [[(1e4, 0), (-1e4, 1), (0.0, 2)], [(-1e4, 0), (1e4, 1)]]
    for loss in (softmax_loss, plackett_luce_loss):
        scores, ranks, offsets = flat(rows)
        scores.requires_grad_()
        found = loss(scores, ranks, offsets)
        assert found.isfinite().all()
        assert found[1].item() == 2e4
        found.sum().backward()
        assert scores.grad is not None
        assert scores.grad.isfinite().all()


def test_descent_raises_the_best_and_lowers_the_worst() -> None:
    for loss in (softmax_loss, plackett_luce_loss):
        scores, ranks, offsets = flat([[(0.0, 2), (0.0, 0), (0.0, 1)], [(0.0, 0), (0.0, 1)]])
        scores.requires_grad_()
        loss(scores, ranks, offsets).sum().backward()
        assert scores.grad is not None
        worst, best, middle, better, worse = scores.grad.tolist()
        assert best < middle <= worst
        assert best < 0 < worst
        assert (better, worse) == (-0.5, 0.5)
        assert best + middle + worst == pytest.approx(0)  # a constant added to all scores changes nothing


def test_rows_of_one_are_refused() -> None:
    for loss in (softmax_loss, plackett_luce_loss):
        with pytest.raises(SampleError, match="fewer than two candidates"):
            loss(torch.zeros(3), torch.tensor([0, 1, 0]), torch.tensor([0, 2, 3]))
