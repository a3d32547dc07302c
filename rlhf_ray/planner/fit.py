"""From measured seconds to the factors of a calibration: the least relative error that no negative factor has."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray


def fit_factors(
    ideal: Sequence[Mapping[str, float]], seconds: Sequence[float], known: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Factors `f` with `seconds ≈ Σ f[name] · ideal[name]`, none of them negative.

    The sum of squared relative errors is the least that there is. Terms that are too alike in all measurements to be
    told apart share what they explain, as chance has it; predictions for similar work are right all the same.

    Args:
        ideal: of each measurement, the same names in all of them.
        seconds: that each measurement took, positive.
        known: factors that are not to be found.
    """
    known = known or {}
    names = [name for name in ideal[0] if name not in known]
    taken = np.asarray(seconds)
    terms = np.array([[row[name] for name in names] for row in ideal]) / taken[:, None]
    wanted = 1 - np.array([sum(known[name] * row[name] for name in known) for row in ideal]) / taken
    scale = np.abs(terms).max(axis=0)
    used = [column for column in range(len(names)) if scale[column] > 0]
    found = np.zeros(len(names))
    found[used] = _nonnegative(terms[:, used] / scale[used], wanted) / scale[used]
    return {**dict(zip(names, found.tolist(), strict=True)), **known}


def _nonnegative(terms: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares over all sets of columns; the best solution without a negative entry is the best at all, because
    the problem is convex. There are few columns."""
    columns = range(terms.shape[1])
    best, least = np.zeros(terms.shape[1]), float(wanted @ wanted)
    for size in range(1, min(terms.shape) + 1):
        for chosen in combinations(columns, size):
            solution, *_ = np.linalg.lstsq(terms[:, chosen], wanted, rcond=None)
            if (solution < 0).any():
                continue
            missed = terms[:, chosen] @ solution - wanted
            if (error := float(missed @ missed)) < least * (1 - 1e-9):
                best, least = np.zeros(terms.shape[1]), error
                best[list(chosen)] = solution
    return best
