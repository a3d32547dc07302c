"""What a reward part did wrong, and the check of every answer that a part gives."""

import reprlib
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from rlhf_ray.data.trajectory import Floats


class RewardError(Exception):
    """A part of the reward that can't score.

    Attributes:
        part: name of the part, as in the metric `reward/<part>`.
        reason: what went wrong and how to cure it.
        samples: uids of the samples concerned; empty when it is not about samples.
    """

    def __init__(self, part: str, reason: str, samples: Sequence[str] = ()) -> None:
        self.part = part
        self.reason = reason
        self.samples = tuple(samples)
        named = ", ".join(self.samples[:8]) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
        super().__init__(f"reward {part!r}: {reason}" + (f" (samples {named})" if named else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions leave their actor pickled; the default would call __init__ with the message alone.
        return type(self), (self.part, self.reason, self.samples)


def checked_scores(part: str, source: str, answer: object, uids: Sequence[str]) -> Floats:
    """`answer` as float32 `[samples]`, when it is one finite number for each sample.

    Args:
        part: name of the part.
        source: what answered, for the error: "reward function 'x:y'".
        answer: a list, a tuple or an array.
        uids: of the samples, `[samples]`.

    Raises:
        RewardError: it is something else; samples whose score is no finite number are named.
    """
    values = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(values, list | tuple):
        raise RewardError(part, f"{source} gave {type(answer).__name__}, but must give a list of numbers", uids)
    if len(values) != len(uids):
        raise RewardError(
            part,
            f"{source} gave {len(values)} scores for {len(uids)} samples, but must give one for each, in order",
            uids,
        )
    wrong = [i for i, value in enumerate(values) if isinstance(value, bool) or not isinstance(value, Real)]
    if wrong:
        first = values[wrong[0]]
        raise RewardError(
            part,
            f"{source} gave {reprlib.repr(first)} ({type(first).__name__}) as a score, but must give numbers",
            [uids[i] for i in wrong],
        )
    try:
        with np.errstate(over="ignore"):
            scores = np.asarray(values, np.float64).astype(np.float32)
    except OverflowError as error:  # a whole number beyond any float
        raise RewardError(part, f"{source} gave a score that no float holds: {error}", uids) from error
    infinite = np.flatnonzero(~np.isfinite(scores))
    if len(infinite):
        raise RewardError(
            part,
            f"{source} gave {values[infinite[0]]!r} as a score, but must give finite float32 numbers",
            [uids[i] for i in infinite],
        )
    return scores
