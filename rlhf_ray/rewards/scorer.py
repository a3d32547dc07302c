"""What all that scores texts has in common: batches, and the check of every answer."""

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from rlhf_ray.config.rewards import FunctionReward, HttpReward, part_name
from rlhf_ray.data.trajectory import Floats
from rlhf_ray.rewards.errors import RewardError


class TextBatch(NamedTuple):
    """Samples that are scored together, `[samples]` each."""

    prompts: Sequence[str]
    responses: Sequence[str]
    uids: Sequence[str]
    columns: Mapping[str, Sequence[Any]]


class TextScorer(ABC):
    """Scores samples batch by batch.

    Args:
        config: of the part.
        source: what answers, for errors: "reward function 'x:y'".
    """

    def __init__(self, config: FunctionReward | HttpReward, source: str) -> None:
        self._part = part_name(config)
        self._source = source
        self._batch_size = config.batch_size

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        uids: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Floats:
        """One score for each sample, float32 `[samples]`.

        Args:
            columns: by name, a value for each sample, None where its row has none.

        Raises:
            RewardError: there is no answer, or one that is not a finite number for each sample; the samples of the
                batch, or those whose score is none, are named.
        """
        scores = [np.empty(0, np.float32)]
        for start in range(0, len(uids), self._batch_size):
            part = slice(start, start + self._batch_size)
            of_part = {name: values[part] for name, values in (columns or {}).items()}
            batch = TextBatch(prompts[part], responses[part], uids[part], of_part)
            scores.append(self._checked(self._answer(batch), batch.uids))
        return np.concatenate(scores)

    @abstractmethod
    def _answer(self, batch: TextBatch) -> Any:
        """What is said of one batch, as it comes."""

    def _checked(self, answer: Any, uids: Sequence[str]) -> Floats:
        """An answer as float32 `[samples]`, when it is one finite number for each."""
        values = answer.tolist() if hasattr(answer, "tolist") else answer
        if not isinstance(values, list | tuple):
            raise self._error(f"gave {type(answer).__name__}, but must give a list of numbers", uids)
        if len(values) != len(uids):
            raise self._error(
                f"gave {len(values)} scores for {len(uids)} samples, but must give one for each, in order", uids
            )
        wrong = [i for i, value in enumerate(values) if isinstance(value, bool) or not isinstance(value, Real)]
        if wrong:
            first = values[wrong[0]]
            raise self._error(
                f"gave {reprlib.repr(first)} ({type(first).__name__}) as a score, but must give numbers",
                [uids[i] for i in wrong],
            )
        try:
            with np.errstate(over="ignore"):
                scores = np.asarray(values, np.float64).astype(np.float32)
        except OverflowError as error:  # a whole number beyond any float
            raise self._error(f"gave a score that no float holds: {error}", uids) from error
        infinite = np.flatnonzero(~np.isfinite(scores))
        if len(infinite):
            raise self._error(
                f"gave {values[infinite[0]]!r} as a score, but must give finite float32 numbers",
                [uids[i] for i in infinite],
            )
        return scores

    def _error(self, reason: str, uids: Sequence[str] = ()) -> RewardError:
        return RewardError(self._part, f"{self._source} {reason}", uids)
