"""What each actor did when: spans recorded inside actors, collected into one Chrome/Perfetto trace."""

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from rlhf_ray.recovery.files import replace_file
from rlhf_ray.telemetry.errors import DamagedFileError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """One piece of work.

    Attributes:
        name: of the work, such as `generate`.
        start_s, end_s: seconds since the epoch, so that spans of several hosts line up as well as their clocks do.
        step: of the run, None outside of steps.
    """

    name: str
    start_s: float
    end_s: float
    step: int | None = None


@dataclass(frozen=True)
class OpenSpan:
    """A piece of work that goes on.

    Attributes:
        name: of the work.
        start_s: seconds since the epoch.
    """

    name: str
    start_s: float


class SpanRecorder:
    """Collects the spans of one process until they are drained. Any thread may record.

    Attributes:
        idle_since_s: when the last span ended, seconds since the epoch.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._open: list[OpenSpan] = []
        self.idle_since_s = time.time()

    @contextmanager
    def span(self, name: str, step: int | None = None) -> Iterator[None]:
        """Record the body, also when it raises."""
        # The duration comes from a clock that never jumps; only the start is wall time.
        start_s, began = time.time(), time.perf_counter()
        going_on = OpenSpan(name, start_s)
        with self._lock:
            self._open.append(going_on)
        try:
            yield
        finally:
            done = Span(name, start_s, start_s + time.perf_counter() - began, step)
            with self._lock:
                self._open.remove(going_on)  # or one that equals it
                self._spans.append(done)
                self.idle_since_s = done.end_s

    def open(self) -> tuple[OpenSpan, ...]:
        """What goes on right now, in order of its start."""
        with self._lock:
            return tuple(self._open)

    def drain(self) -> list[Span]:
        """The spans that ended since the last call, in order of their end. Each is handed out once."""
        with self._lock:
            spans, self._spans = self._spans, []
        return spans


class Recording(Protocol):
    """What has a recorder."""

    recorder: SpanRecorder


_Self = TypeVar("_Self", bound=Recording)
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")
_Method = Callable[Concatenate[_Self, _Args], _Result]


def in_span(name: str) -> Callable[[_Method[_Self, _Args, _Result]], _Method[_Self, _Args, _Result]]:
    """Makes each call of a method a span of its object's recorder."""

    def recorded(method: _Method[_Self, _Args, _Result]) -> _Method[_Self, _Args, _Result]:
        @wraps(method)
        def call(self: _Self, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
            with self.recorder.span(name):
                return method(self, *args, **kwargs)

        return call

    return recorded


def uncovered_seconds(spans: Iterable[Span], start_s: float, end_s: float) -> float:
    """Seconds between `start_s` and `end_s` that lie in no span. 0 when the window is empty."""
    uncovered, reached = 0.0, start_s
    for span in sorted(spans, key=lambda span: span.start_s):
        if span.end_s > reached:
            uncovered += max(0.0, min(span.start_s, end_s) - reached)
            reached = span.end_s
        if reached >= end_s:
            return uncovered
    return uncovered + max(0.0, end_s - reached)


def covered_seconds(spans: Sequence[Span]) -> float:
    """Seconds that lie in at least one of the spans."""
    if not spans:
        return 0.0
    start_s, end_s = min(span.start_s for span in spans), max(span.end_s for span in spans)
    return end_s - start_s - uncovered_seconds(spans, start_s, end_s)


_HEAD = b'{"displayTimeUnit":"ms","traceEvents":['
_TAIL = b"\n]}\n"
# Viewers want thread ids that differ between processes and are not 0: a process has the ids above its own.
_IDS_PER_ROLE = 100_000
_LANES = 16


class Timeline:
    """Appends spans to a trace file that is complete, valid JSON after every call.

    A role is a process of the trace, a rank a thread. Spans of one actor that overlap without one lying inside the
    other (shards scored while others generate) get a further thread, as viewers draw a thread's spans as a stack.
    An existing file, of the run that this one resumes, is appended to.

    Raises:
        DamagedFileError: the file is not one that a Timeline wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._processes: dict[str, int] = {}
        self._threads: set[int] = set()
        self._lanes: dict[str, list[deque[Span]]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            self._continue()
        else:
            replace_file(path, _HEAD + _TAIL)

    def add(self, actor: str, spans: Sequence[Span]) -> None:
        """Append the spans of `actor`: `role/rank`, or a role alone when it has one process."""
        with self._lock:
            events = [
                event
                for span in sorted(spans, key=lambda span: (span.start_s, -span.end_s))
                for event in self._events(actor, span)
            ]
            if events:
                self._append(events)

    def _events(self, actor: str, span: Span) -> Iterator[dict[str, Any]]:
        role, slash, last = actor.rpartition("/")
        role, rank = (role, int(last)) if slash and last.isdecimal() else (actor, 0)
        lane = _free_lane(self._lanes.setdefault(actor, []), span)
        if role not in self._processes:
            pid = self._processes[role] = _IDS_PER_ROLE * (len(self._processes) + 1)
            yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": role}}
        pid = self._processes[role]
        tid = pid + 1 + rank * _LANES + lane
        if tid not in self._threads:
            self._threads.add(tid)
            name = actor if lane == 0 else f"{actor} ({lane + 1})"
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
        # Both ends are rounded before the difference is taken, so rounding never makes neighbours overlap.
        start, end = round(span.start_s * 1e6), round(span.end_s * 1e6)
        event = {"ph": "X", "name": span.name, "pid": pid, "tid": tid, "ts": start, "dur": end - start}
        yield event if span.step is None else {**event, "args": {"step": span.step}}

    def _append(self, events: Sequence[dict[str, Any]]) -> None:
        body = b",\n".join(json.dumps(event, separators=(",", ":")).encode() for event in events)
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            base = os.fstat(descriptor).st_size - len(_TAIL)
            comma = b"" if base == len(_HEAD) else b","
            content = comma + b"\n" + body + _TAIL
            # One write over the closing bracket: nobody sees the file without one.
            if os.pwrite(descriptor, content, base) != len(content):
                os.pwrite(descriptor, _TAIL, base)
                os.ftruncate(descriptor, base + len(_TAIL))
                raise OSError(f"{self.path}: the disk took only a part of the new spans; the file is as before")
        finally:
            os.close(descriptor)

    def _continue(self) -> None:
        """Learn which processes and threads the file has; close it again when a killed writer left it open."""
        with self.path.open("rb") as file:
            if file.readline().removesuffix(_TAIL).rstrip() != _HEAD:
                raise DamagedFileError(self.path, "is not a trace of this program")
            whole, lines = True, []
            for line in file:
                event = _event_of(line)
                if event is not None:
                    lines.append(line.rstrip(b",\n"))
                    self._know(event)
                whole = line == b"]}\n"
        if not whole:
            logger.warning("%s: closed again after a run was killed while writing it", self.path)
            replace_file(self.path, _HEAD + b",".join(b"\n" + line for line in lines) + _TAIL)

    def _know(self, event: dict[str, Any]) -> None:
        if event.get("name") == "process_name" and event["ph"] == "M":
            self._processes[event["args"]["name"]] = event["pid"]
        elif event.get("name") == "thread_name" and event["ph"] == "M":
            self._threads.add(event["tid"])


def _event_of(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line.rstrip(b",\n"))
    except ValueError:
        return None
    return event if isinstance(event, dict) and "ph" in event else None


def _free_lane(lanes: list[deque[Span]], span: Span) -> int:
    """The first lane in which `span` lies beside or inside its neighbours; the last one takes what fits nowhere."""
    for lane, recent in enumerate(lanes):
        if lane == _LANES - 1 or all(_stack(span, other) for other in recent):
            recent.append(span)
            return lane
    lanes.append(deque([span], maxlen=64))
    return len(lanes) - 1


def _stack(a: Span, b: Span) -> bool:
    apart = a.end_s <= b.start_s or b.end_s <= a.start_s
    inside = (a.start_s >= b.start_s and a.end_s <= b.end_s) or (b.start_s >= a.start_s and b.end_s <= a.end_s)
    return apart or inside
