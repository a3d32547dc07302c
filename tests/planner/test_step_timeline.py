"""Tasks that wait for one another and share what they run on."""

import pytest

from rlhf_ray.planner.timeline import Task, covered, run


def task(seconds: float, needs: dict[str, float], *after: int, role: str = "policy") -> Task:
    return Task("phase", (role,), seconds, needs, after)


def ends(tasks: list[Task], **capacity: float) -> list[float]:
    return [span.end for span in run(tasks, capacity)]


def test_tasks_on_devices_of_their_own_run_at_the_same_time() -> None:
    assert ends([task(3, {"a": 1}), task(5, {"b": 1})], a=1, b=1) == [3, 5]


def test_tasks_on_one_device_take_turns_so_that_their_times_add_up() -> None:
    assert ends([task(3, {"a": 1}), task(5, {"a": 1})], a=1) == [6, 8]


def test_cores_are_shared_by_threads() -> None:
    # Three threads on two cores: both run at two thirds, until the longer one has the cores for itself.
    assert ends([task(2, {"cores": 1}), task(4, {"cores": 2})], cores=2) == pytest.approx([3, 5])
    assert ends([task(2, {"cores": 1}), task(4, {"cores": 1})], cores=2) == [2, 4]


def test_a_task_waits_for_all_that_it_comes_after() -> None:
    spans = run([task(1, {}), task(4, {}), task(2, {}, 0, 1), task(0, {}, 2)], {})
    assert [(span.begin, span.end) for span in spans] == [(0, 1), (0, 4), (4, 6), (6, 6)]


def test_time_in_which_spans_overlap_counts_once() -> None:
    spans = run([task(2, {}), task(3, {}), task(1, {}, 1), task(1, {}, 2), task(1, {}, 3)], {})
    assert covered(spans) == 6
    assert covered([spans[0], spans[2], spans[4]]) == 4


def test_no_task_may_wait_for_a_later_one() -> None:
    with pytest.raises(AssertionError, match="phase waits for a later task"):
        run([task(1, {}, 1), task(1, {})], {})
