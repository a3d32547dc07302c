"""Mean and deviation of a reward model's scores, which stand in the `config.json` of its folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.models.heads import ModelError, load_config

_KEYS = ("score_mean", "score_std")
_METRICS = ("score/mean", "score/std")


@dataclass(frozen=True)
class ScoreScale:
    """Of the scores that a model gave to the texts that it was evaluated on.

    Attributes:
        mean: of the scores.
        std: their standard deviation, above 0.
    """

    mean: float
    std: float

    @classmethod
    def of_metrics(cls, metrics: Mapping[str, float]) -> Self | None:
        """That of a step that was evaluated, else None; also None when all texts got the same score."""
        mean, std = (metrics.get(name) for name in _METRICS)
        return cls(mean, std) if mean is not None and std else None

    def normalise(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """(score − mean) ÷ deviation."""
        return ((scores - self.mean) / self.std).astype(np.float32)


def scale_of(model: str, *, trust_remote_code: bool = False) -> ScoreScale | None:
    """The scale in a model folder, None when it has none.

    Raises:
        ModelError: the folder has no config, or one in which they are no numbers.
    """
    config = load_config(model, trust_remote_code=trust_remote_code)
    mean, std = (getattr(config, key, None) for key in _KEYS)
    if mean is None or not std:
        return None
    try:
        return ScoreScale(float(mean), float(std))
    except (TypeError, ValueError):
        raise ModelError(model, f"score_mean and score_std in its config.json are {mean!r} and {std!r}") from None


def write_scale(folder: Path, scale: ScoreScale | None) -> None:
    """Put a scale into a model folder; with None take away what came along from the model that was trained on."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    own = {} if scale is None else dict(zip(_KEYS, (scale.mean, scale.std), strict=True))
    if own or config.keys() & set(_KEYS):
        kept = {key: value for key, value in config.items() if key not in _KEYS}
        path.write_text(json.dumps(kept | own, indent=2, sort_keys=True) + "\n", encoding="utf-8")
