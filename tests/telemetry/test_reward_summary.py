"""The one line that says whether a run learned."""

import pytest

from rlhf_ray.telemetry.errors import TelemetryError
from rlhf_ray.telemetry.summary import RewardSummary, reward_summary


def _rows(count: int) -> list[dict[str, float]]:
    return [{"step": step, "reward/mean": float(step), "kl/mean": step / 10} for step in range(1, count + 1)]


def test_the_first_five_steps_are_compared_with_the_last_five() -> None:
    summary = reward_summary(_rows(30))
    assert (summary.first, summary.last, summary.n) == (3.0, 28.0, 5)
    assert summary.kl_last == pytest.approx(2.8)
    assert str(summary) == (
        "mean reward 3.000 in the first 5 steps, 28.000 in the last (+25.000), KL 2.80 nats per response"
    )


@pytest.mark.parametrize(("steps", "n"), [(1, 1), (2, 1), (3, 1), (7, 3), (9, 4), (10, 5)])
def test_beginning_and_end_of_a_short_run_do_not_overlap(steps: int, n: int) -> None:
    assert reward_summary(_rows(steps)).n == n


def test_rows_without_the_metric_are_left_out_and_parts_can_be_summed_up() -> None:
    rows = [
        {"step": 0.0, "eval/accuracy": 0.5},
        {"step": 1.0, "reward/vader": 0.25},
        {"step": 2.0, "reward/vader": 0.0},
    ]
    summary = reward_summary(rows, metric="reward/vader")
    assert summary == RewardSummary(first=0.25, last=0.0, kl_last=None, n=1)
    assert str(summary) == "mean reward 0.250 in the first step, 0.000 in the last (-0.250)"


def test_a_run_without_the_metric_is_told() -> None:
    with pytest.raises(TelemetryError, match="'reward/mean'"):
        reward_summary([{"step": 1.0}])
