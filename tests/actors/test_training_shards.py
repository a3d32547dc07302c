"""What is made of generated shards and their columns, on references that are their objects."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import numpy as np
import pytest

from rlhf_ray.actors import training_shards
from rlhf_ray.actors.shards import ScoredColumns
from rlhf_ray.actors.training_shards import TrainingShardReport, make_training_shard
from rlhf_ray.algorithms.moments import Moments
from rlhf_ray.algorithms.value_loss import ExplainedVariance
from rlhf_ray.config.algorithm import KL, PPO
from rlhf_ray.data.columns import ColumnPart, Columns, TrainingShard
from rlhf_ray.data.trajectory import Floats, TrajectoryBatch, take_rows

MakeBatch = Callable[..., TrajectoryBatch]
KL_COEF = 0.3
GAMMA, LAMBDA = 0.9, 0.7
ALGORITHM = PPO(gamma=GAMMA, gae_lambda=LAMBDA, kl=KL(estimator="k3"))


@pytest.fixture(autouse=True)
def _references_are_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_shards, "fetch_data", lambda refs, what: list(refs))


def column_of(batch: TrajectoryBatch, random: np.random.Generator) -> list[ColumnPart]:
    """Random numbers, as two ranks give them."""
    values = random.standard_normal(len(batch.response_tokens)).astype(np.float32)
    ranks = [tuple(range(first, len(batch), 2)) for first in (0, 1)]
    return [ColumnPart(mine, values[take_rows(batch.response_offsets, mine)]) for mine in ranks]


def whole(parts: Sequence[ColumnPart], batch: TrajectoryBatch) -> Floats:
    column = np.empty(len(batch.response_tokens), np.float32)
    for part in parts:
        column[take_rows(batch.response_offsets, part.samples)] = part.values
    return column


def scored(shards: list[TrajectoryBatch], columns: list[list[list[ColumnPart]]]) -> ScoredColumns:
    old, reference, *values = columns
    return ScoredColumns(shards, old, reference, values[0] if values else None)  # type: ignore[arg-type]


def masked(batch: TrajectoryBatch, random: np.random.Generator) -> TrajectoryBatch:
    """Some tokens are context; the first of each response is not."""
    mask = random.random(len(batch.response_tokens)) < 0.6
    mask[batch.response_offsets[:-1]] = True
    return replace(batch, loss_mask=mask)


def test_each_token_gets_the_advantage_that_loops_in_float64_give_it(make_batch: MakeBatch) -> None:
    """Also where tokens between the policy's own are context, which is as if they were not there."""
    random = np.random.default_rng(1)
    for batch in (make_batch([3, 1, 4], [2, 7, 5]), masked(make_batch([3, 1, 4], [2, 7, 5]), random)):
        scores = random.standard_normal(3).astype(np.float32)
        columns = [[column_of(batch, random)] for _ in range(3)]
        shard, report = make_training_shard(scored([batch], columns), scores, KL_COEF, ALGORITHM)
        old, reference, values = (whole(column[0], batch).astype(np.float64) for column in columns)
        found = shard.columns
        assert found.advantages is not None
        assert found.returns is not None
        assert found.old_logprobs is not None
        assert found.values is not None
        assert found.old_logprobs.tolist() == old.tolist()
        assert found.values.tolist() == values.tolist()
        mismatch, every = 0.0, []
        for sample in range(3):
            tokens = range(*batch.response_offsets[sample : sample + 2])
            actions = [token for token in tokens if batch.loss_mask[token]]
            kl = {t: np.exp(reference[t] - old[t]) - 1 - (reference[t] - old[t]) for t in actions}
            advantage, after = 0.0, 0.0
            for token in reversed(actions):
                reward = -KL_COEF * kl[token] + (scores[sample] if token == actions[-1] else 0.0)
                advantage = reward + GAMMA * after - values[token] + GAMMA * LAMBDA * advantage
                after = values[token]
                assert found.advantages[token] == pytest.approx(advantage, rel=1e-5, abs=1e-5)
                assert found.returns[token] == pytest.approx(advantage + values[token], rel=1e-5, abs=1e-5)
                every.append(advantage)
            for token in set(tokens) - set(actions):
                assert found.advantages[token] == found.returns[token] == 0
            assert report.kl[sample] == pytest.approx(sum(old[t] - reference[t] for t in actions), rel=1e-5)
            assert report.penalty[sample] == pytest.approx(sum(kl.values()), rel=1e-5)
            mismatch += sum(abs(float(batch.engine_logprobs[t]) - old[t]) for t in actions)
        assert report.mismatch == pytest.approx(mismatch, rel=1e-5)
        assert report.advantages is not None
        assert (report.advantages.count, report.advantages.mean) == pytest.approx((len(every), np.mean(every)))


def test_a_training_shard_is_what_its_generated_shards_are_one_by_one(make_batch: MakeBatch) -> None:
    random = np.random.default_rng(1)
    shards = [
        make_batch([3, 1, 4], [2, 7, 1], seed=1),
        make_batch([5], [6], seed=2),
        make_batch([2, 2], [3, 3], seed=3),
    ]
    scores = [random.standard_normal(len(shard)).astype(np.float32) for shard in shards]
    columns = [[column_of(shard, random) for shard in shards] for _ in range(3)]
    joined, report = make_training_shard(scored(shards, columns), np.concatenate(scores), KL_COEF, ALGORITHM)
    alone = [
        make_training_shard(scored([shard], [[column[place]] for column in columns]), score, KL_COEF, ALGORITHM)
        for place, (shard, score) in enumerate(zip(shards, scores, strict=True))
    ]
    assert_same(joined, TrainingShard.concat([shard for shard, _ in alone]))
    assert report.kl.tolist() == np.concatenate([each.kl for _, each in alone]).tolist()
    assert report.mismatch == pytest.approx(sum(each.mismatch for _, each in alone))
    merged = merge([each for _, each in alone])
    assert (report.advantages, report.explained_variance) != (None, None)
    found = (report.advantages, report.explained_variance)
    assert (found[0].count, found[0].mean, found[0].m2) == pytest.approx(  # type: ignore[union-attr]
        (merged[0].count, merged[0].mean, merged[0].m2)
    )
    assert found[1].value == pytest.approx(merged[1].value)  # type: ignore[union-attr]


def assert_same(one: TrainingShard, other: TrainingShard) -> None:
    assert one.batch.uids == other.batch.uids
    assert one.batch.response_tokens.tolist() == other.batch.response_tokens.tolist()
    for column in fields(Columns):
        mine, theirs = getattr(one.columns, column.name), getattr(other.columns, column.name)
        assert (mine is None) == (theirs is None)
        assert mine is None or mine.tolist() == theirs.tolist(), column.name


def merge(reports: list[TrainingShardReport]) -> tuple[Moments, ExplainedVariance]:
    moments, explained = Moments(), ExplainedVariance()
    for report in reports:
        assert report.advantages is not None
        assert report.explained_variance is not None
        moments, explained = moments.merge(report.advantages), explained.merge(report.explained_variance)
    return moments, explained


def test_an_estimator_of_whole_samples_leaves_advantages_to_the_controller(make_batch: MakeBatch) -> None:
    random = np.random.default_rng(2)
    batch = make_batch([3, 1], [2, 3])
    columns = [[column_of(batch, random)] for _ in range(2)]
    ppo = PPO(advantage="rloo")
    shard, report = make_training_shard(scored([batch], columns), np.ones(2, np.float32), KL_COEF, ppo)
    assert {f.name for f in fields(Columns) if getattr(shard.columns, f.name) is not None} == {"old_logprobs"}
    assert report.advantages is None
    assert report.explained_variance is None
    difference = whole(columns[0][0], batch) - whole(columns[1][0], batch)
    assert report.penalty.tolist() == pytest.approx([difference[:2].sum(), difference[2:].sum()])


def test_a_loss_that_asks_for_reference_logprobs_gets_them(
    make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_ray.config import plugs

    asking = plugs.PolicyLoss("rlhf_ray.algorithms.policy_loss:clipped_policy_loss", columns=("reference_logprobs",))
    monkeypatch.setitem(plugs.POLICY_LOSSES, "asking", asking)
    random = np.random.default_rng(3)
    batch = make_batch([3, 1], [2, 3])
    columns = [[column_of(batch, random)] for _ in range(2)]
    ppo = PPO(advantage="grpo", policy_loss="asking")
    shard, _ = make_training_shard(scored([batch], columns), np.ones(2, np.float32), KL_COEF, ppo)
    assert shard.columns.reference_logprobs is not None
    assert shard.columns.reference_logprobs.tolist() == whole(columns[1][0], batch).tolist()
