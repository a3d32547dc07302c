"""When a run over a data set has stopped getting better."""

import math
from collections.abc import Mapping
from typing import Any

from rlhf_ray.config.run import KeepBest


class EarlyStop:
    """Watches one metric of the evaluations.

    Args:
        keep_best: the metric, and whether more or less of it is better.
        patience: evaluations in a row without a new best after which it is over.
    """

    def __init__(self, keep_best: KeepBest, patience: int) -> None:
        self._metric, self._sign = keep_best.metric, 1.0 if keep_best.mode == "max" else -1.0
        self._patience = patience
        self._best: float | None = None
        self._since_best = 0

    @property
    def over(self) -> bool:
        """Whether to stop."""
        return self._since_best >= self._patience

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Take in an evaluation and say whether it is the best so far. An equal one is not."""
        value = self._sign * metrics[self._metric]
        if not math.isnan(value) and (self._best is None or value > self._best):
            self._best, self._since_best = value, 0
            return True
        self._since_best += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"best": self._best, "since_best": self._since_best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._best, self._since_best = state["best"], state["since_best"]
