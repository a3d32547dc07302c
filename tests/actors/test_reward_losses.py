"""The loss that a config names is the one that is computed, weighed by row, in a pack as in a padded batch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_ray.actors.reward_losses import Judgements, row_losses, row_stats
from rlhf_ray.actors.reward_training import RewardTrainingWorker
from rlhf_ray.config.reward_loss import AllPairs, BradleyTerry, PlackettLuce, RewardLoss, Softmax
from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.data.trajectory import offsets_of
from rlhf_ray.models.heads import load_scalar

CPU = torch.device("cpu")


def comparisons(ranks: list[list[int]], lengths: list[int] | None = None, **rows: list[float]) -> ComparisonSet:
    """Rows with these ranks over random tokens."""
    flat = [rank for row in ranks for rank in row]
    lengths = lengths or [3] * len(flat)
    return ComparisonSet(
        uids=tuple(f"row{number}" for number in range(len(ranks))),
        token_ids=np.random.default_rng(1).integers(3, 512, sum(lengths)).astype(np.int32),
        token_offsets=offsets_of(lengths),
        answer_starts=np.zeros(len(flat), np.int64),
        candidate_offsets=offsets_of([len(row) for row in ranks]),
        ranks=np.array(flat, np.int64),
        margins=np.array(rows.get("margins", [0.0] * len(ranks)), np.float32),
        weights=np.array(rows.get("weights", [1.0] * len(ranks))),
        dropped=0,
        truncated=0,
    )


def losses_of(loss: RewardLoss, data: ComparisonSet, scores: list[float]) -> list[float]:
    found: list[float] = row_losses(
        loss, torch.tensor(scores, dtype=torch.float64), Judgements.of(data, range(len(data)), CPU)
    ).tolist()
    return found


LOG3 = math.log(3)


@pytest.mark.parametrize(
    ("loss", "want"),
    [
        # scores log 3, 0 and log 3, 0 the wrong way round; margins log 3 and 0
        (BradleyTerry(type="bradley_terry"), [math.log(4 / 3), math.log(4)]),
        (BradleyTerry(type="bradley_terry", margin=1), [math.log(2), math.log(4)]),
        (BradleyTerry(type="bradley_terry", centering=0.5), [math.log(4 / 3) + LOG3**2 / 2, math.log(4) + LOG3**2 / 2]),
        (Softmax(type="softmax"), [math.log(4 / 3), math.log(4)]),
        (PlackettLuce(type="plackett_luce"), [math.log(4 / 3), math.log(4)]),
        (AllPairs(type="all_pairs"), [math.log(4 / 3), math.log(4)]),
    ],
)
def test_pairs_have_hand_worked_losses(loss: RewardLoss, want: list[float]) -> None:
    data = comparisons([[0, 1], [1, 0]], margins=[LOG3, 0.0])
    assert losses_of(loss, data, [LOG3, 0.0, LOG3, 0.0]) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "want"),
    [
        # strengths 3, 2, 1, ranked as they are
        (Softmax(type="softmax"), math.log(2)),
        (PlackettLuce(type="plackett_luce"), math.log(3)),
        (AllPairs(type="all_pairs"), (math.log(5 / 3) + math.log(4 / 3) + math.log(3 / 2)) / 3),
    ],
)
def test_rankings_have_hand_worked_losses(loss: RewardLoss, want: float) -> None:
    data = comparisons([[1, 2, 0]])
    assert losses_of(loss, data, [math.log(2), 0.0, LOG3]) == pytest.approx([want])


def test_rows_are_taken_in_the_order_asked_for() -> None:
    data = comparisons([[0, 1], [2, 1, 0], [1, 0]], margins=[1.0, 2.0, 3.0], weights=[0.1, 0.2, 0.3])
    judged = Judgements.of(data, [2, 1], CPU)
    assert judged.ranks.tolist() == [1, 0, 2, 1, 0]
    assert judged.offsets.tolist() == [0, 2, 5]
    assert judged.margins.tolist() == [3.0, 2.0]
    assert judged.weights.tolist() == pytest.approx([0.3, 0.2])


def test_ties_count_in_the_loss_but_not_in_accuracy_and_margin() -> None:
    data = comparisons([[0, 1], [0, 0], [0, 1, 1]], weights=[1.0, 2.0, 5.0])
    scores = torch.tensor([3.0, 1.0, 0.0, 4.0, 1.0, 2.0, 0.5])
    judged = Judgements.of(data, range(3), CPU)
    stats = row_stats(torch.tensor([0.1, 0.2, 0.3]), scores, judged)
    assert stats["loss"].value == pytest.approx((0.1 + 0.4 + 1.5) / 8)
    assert stats["accuracy"].value == pytest.approx(2 / 3)
    assert stats["margin"].value == pytest.approx((2.0 - 1.0 + 0.5) / 3)
    only_ties = row_stats(torch.tensor([0.2]), scores[2:4], Judgements.of(data, [1], CPU))
    assert only_ties["accuracy"].weight == 0


LOSSES = [
    BradleyTerry(type="bradley_terry", margin=1, centering=0.01),
    Softmax(type="softmax"),
    PlackettLuce(type="plackett_luce"),
    AllPairs(type="all_pairs"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.type)
def test_packed_micro_batches_learn_what_padded_rows_learn(
    loss: RewardLoss, tiny_model_dir: Path, tmp_path: Path
) -> None:
    pairs_only = isinstance(loss, BradleyTerry)
    ranks = [[0, 1], [1, 0], [0, 0]] if pairs_only else [[2, 0, 1], [0, 1], [1, 0, 2, 0]]
    count = sum(map(len, ranks))
    data = comparisons(
        ranks, lengths=[4, 17, 1, 9, 30, 2, 5, 12, 3][:count], margins=[0.5, 0, 0], weights=[2.0, 0.5, 1.0]
    )
    worker = RewardTrainingWorker.__new__(RewardTrainingWorker)  # its `__init__` is an actor's
    worker.loss = loss
    worker.engine = load_scalar(str(tiny_model_dir), dtype=torch.float32, seed=4)
    worker.engine.model.save_pretrained(tmp_path)
    found = {}
    for micro_batches in ([[0, 1, 2]], [[2], [0, 1]], [[1], [], [2, 0]]):
        worker.engine.zero_grad()
        totals = []
        for rows in micro_batches:
            total, stats = worker.micro_batch_loss(data, rows)
            (total / data.weights.sum()).backward()
            totals.append(float(total.detach()))
            assert bool(stats) == bool(rows)
        found[str(micro_batches)] = (sum(totals) / data.weights.sum(), worker.engine.model.score.weight.grad.clone())

    theirs = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    theirs.config.pad_token_id = 0
    texts = [data.tokens(candidate) for candidate in range(count)]
    ids, mask = torch.zeros(count, max(map(len, texts)), dtype=torch.int64), torch.zeros(count, max(map(len, texts)))
    for row, tokens in enumerate(texts):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.from_numpy(tokens), 1
    judged = Judgements.of(data, range(3), CPU)
    losses = row_losses(loss, theirs(ids, attention_mask=mask).logits[:, 0], judged)
    want = (losses * judged.weights).sum() / judged.weights.sum()
    want.backward()
    for split, (value, gradient) in found.items():
        assert value == pytest.approx(float(want.detach()), rel=1e-5), split
        torch.testing.assert_close(gradient, theirs.score.weight.grad, rtol=1e-4, atol=1e-5)
