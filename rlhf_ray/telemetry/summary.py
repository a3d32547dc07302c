"""Whether a run learned, in one line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.telemetry.errors import TelemetryError

WINDOW = 5


@dataclass(frozen=True)
class RewardSummary:
    """Beginning against end.

    Attributes:
        first: mean over the first `n` steps.
        last: mean over the last `n` steps.
        kl_last: KL per response in nats over the last `n` steps, None when it was not logged.
        n: steps in each mean; fewer than 5 in a run of fewer than 10 steps, so that the two never overlap.
    """

    first: float
    last: float
    kl_last: float | None
    n: int

    def __str__(self) -> str:
        kl = "" if self.kl_last is None else f", KL {self.kl_last:.2f} nats per response"
        steps = "step" if self.n == 1 else f"{self.n} steps"
        change = self.last - self.first
        return f"mean reward {self.first:.3f} in the first {steps}, {self.last:.3f} in the last ({change:+.3f}){kl}"


def reward_summary(rows: Sequence[Mapping[str, float]], metric: str = "reward/mean") -> RewardSummary:
    """Compare the first steps of a run with its last ones.

    Args:
        rows: of metrics.jsonl, in order; those without the metric are left out.
        metric: `reward/mean`, or a part of the reward.

    Raises:
        TelemetryError: no row has the metric.
    """
    rows = [row for row in rows if metric in row]
    if not rows:
        raise TelemetryError(f"no row has the metric {metric!r}: the run has not finished a step yet")
    n = max(1, min(WINDOW, len(rows) // 2))
    kl = [row["kl/mean"] for row in rows[-n:] if "kl/mean" in row]
    return RewardSummary(
        first=sum(row[metric] for row in rows[:n]) / n,
        last=sum(row[metric] for row in rows[-n:]) / n,
        kl_last=sum(kl) / len(kl) if kl else None,
        n=n,
    )
