"""What the critic makes of shards, on references that are their objects."""

from collections.abc import Callable

import numpy as np
import pytest

from rlhf_ray.actors import critic
from rlhf_ray.actors.columns import PortionReport
from rlhf_ray.actors.critic import CriticWorker
from rlhf_ray.algorithms.moments import Moments
from rlhf_ray.algorithms.value_loss import ExplainedVariance
from rlhf_ray.config.algorithm import PPO
from rlhf_ray.data.columns import ColumnPart, TrainingColumns
from rlhf_ray.data.trajectory import Floats, TrajectoryBatch, take_rows
from rlhf_ray.telemetry.trace import SpanRecorder

MakeBatch = Callable[..., TrajectoryBatch]
KL_COEF = 0.3


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> CriticWorker:
    """One without a model."""
    monkeypatch.setattr(critic, "fetch_data", lambda refs, what: list(refs))
    made = CriticWorker.__new__(CriticWorker)  # its `__init__` is an actor's
    made.ppo, made.recorder = PPO(), SpanRecorder()
    return made


def column_of(batch: TrajectoryBatch, random: np.random.Generator) -> list[ColumnPart]:
    """Random numbers, as two ranks give them."""
    values = random.standard_normal(len(batch.response_tokens)).astype(np.float32)
    ranks = [tuple(range(first, len(batch), 2)) for first in (0, 1)]
    return [ColumnPart(mine, values[take_rows(batch.response_offsets, mine)]) for mine in ranks]


def portion_of(
    worker: CriticWorker, shards: list[TrajectoryBatch], scores: Floats, columns: list[list[list[ColumnPart]]]
) -> tuple[tuple[TrajectoryBatch, TrainingColumns], PortionReport]:
    return worker.advantages(shards, scores, KL_COEF, *columns)


def test_a_portion_is_what_its_shards_are_one_by_one(worker: CriticWorker, make_batch: MakeBatch) -> None:
    random = np.random.default_rng(1)
    shards = [
        make_batch([3, 1, 4], [2, 7, 1], seed=1),
        make_batch([5], [6], seed=2),
        make_batch([2, 2], [3, 3], seed=3),
    ]
    scores = [random.standard_normal(len(shard)).astype(np.float32) for shard in shards]
    columns = [[column_of(shard, random) for shard in shards] for _ in range(3)]
    (batch, found), report = portion_of(worker, shards, np.concatenate(scores), columns)
    alone = [
        portion_of(worker, [shard], score, [[column[place]] for column in columns])
        for place, (shard, score) in enumerate(zip(shards, scores, strict=True))
    ]
    assert batch.uids == tuple(uid for shard in shards for uid in shard.uids)
    assert batch.response_tokens.tolist() == np.concatenate([shard.response_tokens for shard in shards]).tolist()
    joined = TrainingColumns.concat([columns for (_, columns), _ in alone])
    for name in TrainingColumns.__dataclass_fields__:
        assert getattr(found, name).tolist() == getattr(joined, name).tolist(), name
    assert report.kl.tolist() == np.concatenate([each.kl for _, each in alone]).tolist()
    assert report.mismatch == pytest.approx(sum(each.mismatch for _, each in alone))
    moments, explained = Moments(), ExplainedVariance()
    for _, each in alone:
        moments, explained = moments.merge(each.advantages), explained.merge(each.explained_variance)
    assert (report.advantages.count, report.advantages.mean, report.advantages.m2) == pytest.approx(
        (moments.count, moments.mean, moments.m2)
    )
    assert report.explained_variance.value == pytest.approx(explained.value)
