"""Reward models: the epochs, and after each evaluation a report on the model as it is then."""

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.actors.device_means import read_stats
from rlhf_ray.actors.reward_losses import Judgements, row_losses, row_stats
from rlhf_ray.actors.reward_training import RewardTrainingGroup
from rlhf_ray.algorithms.calibration import (
    accuracy_by_bucket,
    clustered_share,
    expected_calibration_error,
    reliability,
)
from rlhf_ray.algorithms.reward_model.rows import candidate_pairs
from rlhf_ray.config.jobs import RewardModelJob
from rlhf_ray.config.reward_loss import RewardLoss
from rlhf_ray.controllers.epochs import EpochController
from rlhf_ray.controllers.row_sources import Split
from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.telemetry.metrics import Metrics, reduce_means
from rlhf_ray.telemetry.reward_report import Distribution, JudgedRows, RewardReport, write_report

# Rows of the training data that stand in for held-out ones.
STAND_INS = 1024
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_CHUNK = 1024

Scores = NDArray[np.float32]


class RewardModelController(EpochController):
    """Ranks give scores; metrics, report and scale are made of them here.

    Without held-out rows there is no evaluation but one after the last step, of training rows, so that the model gets a
    scale all the same.
    """

    config: RewardModelJob
    group: RewardTrainingGroup

    def evaluate(self) -> Metrics:
        """Metrics of the held-out rows; writes the report."""
        if self.held_out is None:
            if self.step < self.total:
                return {}
            assert isinstance(self.training.rows, ComparisonSet)
            stand_ins = self.training.rows.first(STAND_INS)
            return self._report(stand_ins, self._score(Split("train", stand_ins)))
        held_out = self.held_out.rows
        assert isinstance(held_out, ComparisonSet)
        scores = self._score(self.held_out)
        found = comparison_metrics(self.config.loss, held_out, scores)
        return {f"eval/{name}": value for name, value in found.items()} | self._report(held_out, scores)

    def _go_back_to_the_best(self) -> bool:
        went = super()._go_back_to_the_best()
        if went:
            self.evaluate()
        return went

    def _score(self, split: Split) -> Scores:
        """Scores of all candidates of a data set, float32 `[candidates]`."""
        assert isinstance(split.rows, ComparisonSet)
        scores = np.empty(len(split.rows.ranks), np.float32)
        calls = self.group.score(self._plan(split, np.arange(len(split.rows))))
        for part in calls.wait(self.config.run.timeouts.score):
            scores[part.candidates] = part.scores
        return scores

    def _report(self, rows: ComparisonSet, scores: Scores) -> Metrics:
        """Write the report, and give the metrics that a model's scale is read from."""
        data = self.config.data
        held_out = self.inputs.held_out is not None
        if np.isfinite(scores).all():  # otherwise the log of metrics ends the run and says why
            path = data.eval if held_out and data.eval is not None else data.train
            write_report(self.folder.path, report_of(rows, scores, self.step, path, held_out=held_out))
        return {"score/mean": float(scores.mean(dtype=np.float64)), "score/std": float(scores.std(dtype=np.float64))}


def comparison_metrics(loss: RewardLoss, rows: ComparisonSet, scores: Scores) -> Metrics:
    """Loss, accuracy and margin of scored rows, as they are logged of a step."""
    parts = []
    for start in range(0, len(rows), _CHUNK):
        some = range(start, min(start + _CHUNK, len(rows)))
        judged = Judgements.of(rows, some, torch.device("cpu"))
        own = torch.from_numpy(scores[rows.candidates(some)])
        parts.append(read_stats(row_stats(row_losses(loss, own, judged), own, judged)))
    return reduce_means(parts)


def report_of(rows: ComparisonSet, scores: Scores, step: int, file: str, *, held_out: bool) -> RewardReport:
    """What a reward model's scores say about it.

    Args:
        rows: that were scored.
        scores: float32 `[candidates]`, finite.
        step: of the run.
        file: that the rows are from.
        held_out: the model was not trained on them.
    """
    pairs = candidate_pairs(torch.from_numpy(rows.ranks), torch.from_numpy(rows.candidate_offsets))
    ordered = ~pairs.tied.numpy()
    better, worse, row = (index.numpy()[ordered] for index in (pairs.better, pairs.worse, pairs.rows))
    values = scores.astype(np.float64)
    difference = values[better] - values[worse]
    correct = difference > 0
    sure = np.abs(difference)
    bins = reliability(1 / (1 + np.exp(-sure)), correct)
    distance = rows.ranks[worse] - rows.ranks[better]
    # A margin is between the best two of a row, so of a ranking it says nothing about the other pairs.
    stated = rows.margins[row] if (rows.margins > 0).any() and (np.diff(rows.candidate_offsets) == 2).all() else None
    best = rows.ranks == 0
    return RewardReport(
        step=step,
        rows=JudgedRows(
            file=file,
            held_out=held_out,
            rows=len(rows),
            candidates=len(scores),
            pairs=len(correct),
            ties=int((~ordered).sum()),
            dropped=rows.dropped,
            truncated=rows.truncated,
        ),
        accuracy=clustered_share(correct, row) if len(correct) else None,
        by_margin=[] if stated is None else accuracy_by_bucket(stated, correct, row),
        by_rank_distance=accuracy_by_bucket(distance, correct, row) if (distance > 1).any() else [],
        by_difference=accuracy_by_bucket(sure, correct, row),
        calibration_error=expected_calibration_error(bins) if bins else None,
        reliability=bins,
        scores={
            name: _distribution(values[chosen])
            for name, chosen in (("all", slice(None)), ("best of a row", best), ("others", ~best))
            if len(values[chosen])
        },
    )


def _distribution(scores: NDArray[np.float64]) -> Distribution:
    return Distribution(
        count=len(scores),
        mean=float(scores.mean()),
        std=float(scores.std()),
        percentiles={str(p): float(np.percentile(scores, p)) for p in PERCENTILES},
    )
