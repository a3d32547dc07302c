"""Each metric has one valid series, whose value and tags come from the row that is logged anyway."""

import re
from collections import Counter as Counted

import pytest
import ray.util.metrics

from rlhf_ray.telemetry.names import METRICS
from rlhf_ray.telemetry.ray_metrics import PHASE_SECONDS, SHARDS, RayMetrics, all_series, series_of
from rlhf_ray.telemetry.status import Progress, Shards
from rlhf_ray.telemetry.trace import Span

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> Values:
    """What Ray would export, by name and tags, with Ray's own checks of tags."""
    exported: Values = {}

    class Kept(ray.util.metrics.Metric):
        def _record(self, value: float, tags: dict[str, str] | None = None) -> None:
            final = self._get_final_tags(tags)
            self._validate_tags(final)
            assert set(final) == set(self._tag_keys)
            exported[self._name, frozenset(final.items())] = value

    class Gauge(Kept):
        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            self._record(value, tags)

    class Counter(Kept):
        def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
            key = (self._name, frozenset(self._get_final_tags(tags).items()))
            self._record(exported.get(key, 0.0) + value, tags)

    monkeypatch.setattr(ray.util.metrics, "Gauge", Gauge)
    monkeypatch.setattr(ray.util.metrics, "Counter", Counter)
    return exported


def _tags(**tags: str) -> frozenset[tuple[str, str]]:
    return frozenset({"run": "tiny", "job": "ppo", **tags}.items())


def test_every_metric_has_a_series_of_its_own_with_a_valid_name() -> None:
    names = [series.name for series in all_series()]
    assert len(names) == len(METRICS) + 2
    assert not [name for name, times in Counted(names).items() if times > 1]
    assert all(re.fullmatch(r"rlhf_[a-z][a-z0-9_]*", name) for name in names)


def test_names_are_those_of_the_metrics() -> None:
    assert series_of("policy/grad_norm").scraped == "ray_rlhf_policy_grad_norm"
    assert series_of("reward/<part>").scraped == "ray_rlhf_reward_part"
    assert PHASE_SECONDS.scraped == "ray_rlhf_phase_seconds_total"


def test_a_step_is_exported_with_run_and_job_and_the_part_of_the_reward(values: Values) -> None:
    RayMetrics("tiny", "ppo").log(3, {"reward/mean": 0.5, "reward/vader": 0.25, "time/step_s": 2.0})
    assert values == {
        ("rlhf_step", _tags()): 3,
        ("rlhf_reward_mean", _tags()): 0.5,
        ("rlhf_reward_part", _tags(part="vader")): 0.25,
        ("rlhf_time_step_s", _tags()): 2.0,
    }


def test_phases_add_up_as_the_mean_over_the_ranks(values: Values) -> None:
    metrics = RayMetrics("tiny", "ppo")
    metrics.phases("policy", [[Span("update", 0.0, 2.0)], [Span("update", 0.0, 4.0), Span("nothing", 1.0, 1.0)]])
    metrics.phases("policy", [[Span("update", 5.0, 6.0)], []])
    assert values == {("rlhf_phase_seconds", _tags(role="policy", phase="update")): 3.5}


def test_shards_that_are_generated_side_by_side_take_their_time_once(values: Values) -> None:
    side_by_side = [Span("generate", 0.0, 2.0), Span("generate", 1.0, 3.0), Span("generate", 5.0, 6.0)]
    RayMetrics("tiny", "ppo").phases("rollout", [side_by_side])
    assert values == {("rlhf_phase_seconds", _tags(role="rollout", phase="generate")): 4.0}


def test_the_queue_is_exported_by_state(values: Values) -> None:
    metrics = RayMetrics("tiny", "ppo")
    metrics.progress(Progress(0, "", 0.0))
    assert not values, "jobs that generate nothing have no shards"
    metrics.progress(Progress(0, "generate", 0.0, Shards(4, 2, 10)))
    wanted = {"waiting": 4, "generating": 2, "generated": 10}
    assert values == {(SHARDS.name, _tags(state=state)): count for state, count in wanted.items()}
