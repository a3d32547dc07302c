"""What a reward part did wrong."""

from collections.abc import Sequence
from typing import Any


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
