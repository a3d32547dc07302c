"""timeline.json is a valid trace at every moment; the time between spans is measured exactly."""

import json
import os
import pickle
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.telemetry.errors import DamagedFileError
from rlhf_ray.telemetry.trace import Span, SpanRecorder, Timeline, uncovered_seconds


def _events(path: Path, phase: str = "X") -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_bytes())["traceEvents"] if event["ph"] == phase]


def _names(path: Path) -> dict[int, str]:
    return {event["tid"]: event["args"]["name"] for event in _events(path, "M") if event["name"] == "thread_name"}


def test_the_file_is_valid_after_every_call_and_holds_what_was_added(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    timeline = Timeline(path)
    assert _events(path) == []
    timeline.add("controller", [])
    assert _events(path) == []
    for step in range(1, 5):
        timeline.add("policy/0", [Span("update", step, step + 0.5, step)])
        timeline.add("rollout/1", [Span("generate", step, step + 0.25, step), Span("sync", step + 0.25, step + 0.5)])
        assert len(_events(path)) == 3 * step
    assert _events(path)[-1] == {
        "ph": "X",
        "name": "sync",
        "pid": _events(path)[-1]["pid"],
        "tid": _events(path)[-1]["tid"],
        "ts": 4_250_000,
        "dur": 250_000,
    }
    assert _events(path)[-2]["args"] == {"step": 4}


def test_a_role_is_a_process_and_a_rank_a_thread_of_it(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    timeline = Timeline(path)
    for actor in ("policy/0", "policy/1", "critic/0", "controller", "policy/0"):
        timeline.add(actor, [Span("work", 1.0, 2.0, 1)])
    processes = {event["pid"]: event["args"]["name"] for event in _events(path, "M") if event["name"] == "process_name"}
    threads = _names(path)
    seen = {(processes[event["pid"]], threads[event["tid"]]) for event in _events(path)}
    assert seen == {
        ("policy", "policy/0"),
        ("policy", "policy/1"),
        ("critic", "critic/0"),
        ("controller", "controller"),
    }
    assert len(_events(path, "M")) == 3 + 4, "each process and thread is named once"


def test_work_inside_other_work_stays_in_the_thread_of_its_rank_and_only_a_crossing_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    timeline = Timeline(path)
    timeline.add("policy/0", [Span("forward", 2.0, 3.0), Span("update", 1.0, 5.0)])
    timeline.add("policy/0", [Span("step", 0.0, 6.0), Span("sync", 5.0, 6.0), Span("crossing", 4.0, 7.0)])
    threads = _names(path)
    where = {event["name"]: threads[event["tid"]] for event in _events(path)}
    assert where == {**dict.fromkeys(("step", "update", "forward", "sync"), "policy/0"), "crossing": "policy/0 (2)"}


def test_a_resumed_run_appends_and_keeps_the_ids(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    Timeline(path).add("policy/0", [Span("update", 1.0, 2.0, 1)])
    resumed = Timeline(path)
    resumed.add("critic/0", [Span("update", 3.0, 4.0, 2)])
    resumed.add("policy/0", [Span("update", 3.0, 4.0, 2)])
    first, critic, policy = _events(path)
    assert (policy["pid"], policy["tid"]) == (first["pid"], first["tid"])
    assert critic["pid"] != first["pid"]
    assert len(_events(path, "M")) == 4


def test_a_file_left_open_by_a_kill_is_closed_again_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    timeline = Timeline(path)
    timeline.add("policy/0", [Span("update", 1.0, 2.0, 1)])
    kept = path.stat().st_size
    timeline.add("policy/0", [Span("update", 3.0, 4.0, 2)])
    whole = path.read_bytes()
    for length in range(kept - 2, len(whole)):
        path.write_bytes(whole[:length])
        Timeline(path).add("critic/0", [Span("update", 5.0, 6.0, 3)])
        steps = [event["args"]["step"] for event in _events(path)]
        assert steps in ([1, 3], [1, 2, 3]), length


def test_a_foreign_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    path.write_text('[{"ph": "X"}]\n')
    with pytest.raises(DamagedFileError, match=r"not a trace of this program.*move it away"):
        Timeline(path)
    assert path.read_text() == '[{"ph": "X"}]\n'


def test_a_full_disk_leaves_the_trace_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "timeline.json"
    timeline = Timeline(path)
    timeline.add("policy/0", [Span("update", 1.0, 2.0, 1)])
    before = path.read_bytes()
    pwrite = os.pwrite

    def half(descriptor: int, content: bytes, offset: int) -> int:
        return pwrite(descriptor, content[: len(content) // 2] if len(content) > 10 else content, offset)

    monkeypatch.setattr("os.pwrite", half)
    with pytest.raises(OSError, match="the file is as before"):
        timeline.add("policy/0", [Span("update", 3.0, 4.0, 2)])
    assert path.read_bytes() == before


_TIMES = st.integers(0, 30).map(float)
_SPANS = st.lists(st.tuples(_TIMES, st.integers(0, 8)).map(lambda t: Span("s", t[0], t[0] + t[1])), max_size=12)


@given(st.lists(_SPANS, min_size=1, max_size=3))
def test_spans_of_one_thread_of_the_trace_never_overlap_by_a_part(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[Span]]
) -> None:
    path = tmp_path_factory.mktemp("trace") / "timeline.json"
    timeline = Timeline(path)
    for spans in batches:
        timeline.add("controller", spans)
    assert len(_events(path)) == sum(map(len, batches))
    for tid in _names(path):
        mine = [(e["ts"], e["ts"] + e["dur"]) for e in _events(path) if e["tid"] == tid]
        for index, (start, end) in enumerate(mine):
            for other_start, other_end in mine[:index]:
                apart = end <= other_start or other_end <= start
                assert (
                    apart or (start >= other_start and end <= other_end) or (start <= other_start and end >= other_end)
                )


@given(_SPANS, _TIMES, st.integers(0, 20))
def test_uncovered_time_is_that_of_the_ticks_that_no_span_covers(
    spans: list[Span], start_s: float, length: int
) -> None:
    end_s = start_s + length
    ticks = [start_s + index for index in range(length)]
    free = [tick for tick in ticks if not any(span.start_s <= tick < span.end_s for span in spans)]
    assert uncovered_seconds(spans, start_s, end_s) == len(free)


def test_a_recorder_hands_out_each_span_once_and_also_of_work_that_raised() -> None:
    recorder = SpanRecorder()
    with recorder.span("outer", step=3), recorder.span("inner"):
        pass
    with pytest.raises(RuntimeError), recorder.span("broken"):
        raise RuntimeError
    inner, outer, broken = recorder.drain()
    assert [inner.name, outer.name, broken.name] == ["inner", "outer", "broken"]
    assert (inner.step, outer.step) == (None, 3)
    assert outer.start_s <= inner.start_s <= inner.end_s
    assert broken.start_s <= broken.end_s
    assert recorder.drain() == []
    assert pickle.loads(pickle.dumps(outer)) == outer, "spans travel from actors to the controller"


def test_no_span_is_lost_between_threads_that_record_and_one_that_drains() -> None:
    recorder, drained = SpanRecorder(), list[Span]()

    def record(name: str) -> None:
        for step in range(300):
            with recorder.span(name, step):
                pass

    threads = [threading.Thread(target=record, args=(str(index),)) for index in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        drained += recorder.drain()
    drained += recorder.drain()
    assert len(drained) == len(set(drained)) == 1200
    for index in range(4):
        steps = [span.step for span in drained if span.name == str(index)]
        assert all(a is not None and b is not None and a < b for a, b in pairwise(steps))
