"""The score of a sample: the weighted sum of the parts of its reward."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.trajectory import Floats
from rlhf_ray.rewards.errors import RewardError


def combine(parts: Mapping[str, NDArray[np.floating]], weights: Mapping[str, float]) -> Floats:
    """`Σ_part weight · score`, summed in float64 in the order of `weights`, as float32 `[samples]`.

    Args:
        parts: scores of each part, `[samples]`.
        weights: the parts that there must be, and their factors. A part with weight 0 is checked like the others.

    Raises:
        RewardError: a part is missing, not asked for, of another shape, or not finite (the positions are named).
    """
    if not weights:
        raise RewardError("sum", "there are no parts to sum: config needs at least one reward")
    for name in weights:
        if name not in parts:
            raise RewardError(name, f"gave no scores (there are scores of {', '.join(parts) or 'no part'})")
    for name in parts:
        if name not in weights:
            raise RewardError(name, f"gave scores, but has no weight (known parts: {', '.join(weights)})")
    first = next(iter(weights))
    samples = np.asarray(parts[first]).size
    total = np.zeros(samples, np.float64)
    for name, weight in weights.items():
        scores = np.asarray(parts[name])
        if scores.shape != (samples,):
            raise RewardError(name, f"gave scores of shape {scores.shape}, but {first!r} scored {samples} samples")
        _check_finite(name, scores)
        total += weight * scores.astype(np.float64)
    with np.errstate(over="ignore"):
        combined = total.astype(np.float32)
    _check_finite("sum", combined)
    return combined


def _check_finite(part: str, scores: NDArray[np.floating]) -> None:
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        named = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
        raise RewardError(part, f"is {scores[bad[0]]} at batch positions {named}, but must be finite")
