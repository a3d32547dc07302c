"""The registry of metric names is what docs and dashboards are made from."""

import pytest

from rlhf_ray.config.run import KeepBest
from rlhf_ray.telemetry.names import METRICS, describe, find_metric
from rlhf_ray.telemetry.plots import PANELS
from rlhf_ray.telemetry.progress import _SHOWN


def test_every_metric_has_one_line_in_the_table() -> None:
    lines = describe().splitlines()
    assert len(lines) == 2 + len(METRICS)
    for name, line in zip(METRICS, lines[2:], strict=True):
        assert line.startswith(f"| `{name}` | ")
        assert line.replace(r"\|", "").count("|") == 3, "a bar in the meaning would end the cell"


def test_a_part_of_the_reward_is_found_under_its_own_name() -> None:
    assert find_metric("reward/vader") == "reward/<part>"
    assert find_metric("reward/mean") == "reward/mean"
    assert find_metric("policy/vader") is None
    assert find_metric("nothing") is None


@pytest.mark.parametrize(
    "name",
    [
        KeepBest().metric,
        *(name for name, _ in _SHOWN),
        *(name for panel in PANELS for name in panel.metrics),
        *(panel.band for panel in PANELS if panel.band),
    ],
)
def test_what_is_ranked_shown_or_drawn_is_a_metric(name: str) -> None:
    assert find_metric(name) is not None
