"""The status of a run is made of what its processes say, whether they answer or not."""

import pytest

from rlhf_ray.telemetry.status import About, Activity, ActorRecord, Progress, RunStatus, phase_of, without_traceback
from rlhf_ray.telemetry.trace import OpenSpan, SpanRecorder

SAID = Activity("update", 90.0, "10.0.0.1", "node", 7, 2**30)


def test_work_that_goes_on_is_open_until_it_ends_and_a_span_afterwards() -> None:
    recorder = SpanRecorder()
    assert recorder.open() == ()
    with recorder.span("outer", 3):
        with recorder.span("inner"):
            assert [span.name for span in recorder.open()] == ["outer", "inner"]
        assert [span.name for span in recorder.open()] == ["outer"]
    assert recorder.open() == ()
    assert recorder.idle_since_s == recorder.drain()[-1].end_s


def test_work_that_raised_is_over() -> None:
    recorder = SpanRecorder()
    with pytest.raises(RuntimeError), recorder.span("broken"):
        raise RuntimeError
    assert recorder.open() == ()


def test_the_phase_is_the_innermost_work_and_began_with_the_first_of_its_kind() -> None:
    assert phase_of((), 5.0) == ("", 5.0)
    assert phase_of((OpenSpan("start", 1.0), OpenSpan("load", 2.0)), 5.0) == ("load", 2.0)
    shards = (OpenSpan("generate", 3.0), OpenSpan("other", 3.5), OpenSpan("generate", 4.0))
    assert phase_of(shards, 5.0) == ("generate", 3.0)


def test_an_actor_starts_answers_falls_silent_and_answers_again() -> None:
    record = ActorRecord("policy", 1)
    assert (record.status.name, record.status.state, record.status.heard_s) == ("policy/1", "starting", None)
    record.unanswered()
    assert record.status.state == "starting", "what loads for minutes is not silent"
    record.answered(SAID, 100.0)
    assert (record.status.state, record.status.activity, record.status.heard_s) == ("up", SAID, 100.0)
    record.unanswered()
    assert (record.status.state, record.status.activity, record.status.heard_s) == ("silent", SAID, 100.0)
    record.answered(SAID, 110.0)
    assert (record.status.state, record.status.heard_s) == ("up", 110.0)


def test_a_dead_actor_keeps_what_it_said_last() -> None:
    record = ActorRecord("policy", 0)
    record.answered(SAID, 100.0)
    record.died("its node is gone")
    assert (record.status.state, record.status.activity, record.status.error) == ("dead", SAID, "its node is gone")


def test_an_actor_that_cannot_say_what_it_does_is_up_with_the_reason() -> None:
    record = ActorRecord("policy", 0)
    record.failed("RuntimeError: no driver", 100.0)
    assert (record.status.state, record.status.error) == ("up", "RuntimeError: no driver")
    record.answered(SAID, 101.0)
    assert record.status.error == ""


def test_the_last_error_names_its_actor() -> None:
    well, dead = ActorRecord("policy", 0), ActorRecord("critic", 1)
    dead.died("out of memory")
    about = About("b", "tiny", "ppo", "/runs/tiny", "10.0.0.1:6379", "10.0.0.1", 1, 0.0, 4)
    status = RunStatus(1.0, about, Progress(0, "", 0.0), 1.0, (well.status, dead.status))
    assert status.last_error == "critic/1: out of memory"
    assert RunStatus(1.0, about, None, 1.0, (well.status,)).last_error == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("policy: update failed: ValueError: x\n\x1b[36mray::PolicyWorker.update()\x1b[39m (pid=1)\n  File", None),
        ("policy: update failed: ValueError: x\nTraceback (most recent call last):\n  File", None),
        ("policy: update failed: ValueError: x", None),
        ("two\nlines", "two\nlines"),
    ],
)
def test_an_error_is_shown_without_the_traceback_in_it(text: str, words: str | None) -> None:
    assert without_traceback(text) == (words or "policy: update failed: ValueError: x")
