"""When tasks begin and end that wait for one another and share devices.

Tasks on the same device take turns, so each gets a part of it; tasks on cores share them when they have more threads
than there are cores. Time runs from event to event, between which nothing changes (processor sharing).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_NEVER = float("inf")


SWITCH = "switch"
"""The phase in which roles come to their devices and leave them."""


@dataclass(frozen=True)
class Task:
    """Something that roles do.

    Attributes:
        phase: that it is a part of.
        roles: that are at work.
        seconds: that it takes with its devices to itself.
        needs: of each resource, how much it uses while it runs.
        after: numbers of the tasks that must be over.
    """

    phase: str
    roles: tuple[str, ...]
    seconds: float
    needs: Mapping[str, float]
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class TaskSpan:
    """When a task ran."""

    task: Task
    begin: float
    end: float


def run(tasks: Sequence[Task], capacity: Mapping[str, float]) -> list[TaskSpan]:
    """All tasks, each starting when those that it waits for are over.

    Args:
        tasks: in an order in which none waits for a later one.
        capacity: of each resource. Where more is needed, all who need it slow down alike.
    """
    for number, task in enumerate(tasks):
        assert all(before < number for before in task.after), f"{task.phase} waits for a later task"
    left = [task.seconds for task in tasks]
    begin, end = [_NEVER] * len(tasks), [_NEVER] * len(tasks)
    waiting, running = list(range(len(tasks))), list[int]()
    now = 0.0
    while waiting or running:
        ready = [number for number in waiting if all(end[before] <= now for before in tasks[number].after)]
        for number in ready:
            begin[number] = now
        running += ready
        waiting = [number for number in waiting if begin[number] == _NEVER]
        speed = _speeds([tasks[number] for number in running], capacity)
        step = min(left[number] / rate for number, rate in zip(running, speed, strict=True))
        now += step
        over = set[int]()
        for number, rate in zip(running, speed, strict=True):
            left[number] -= step * rate
            if left[number] <= 1e-9 * tasks[number].seconds:
                end[number] = now
                over.add(number)
        running = [number for number in running if number not in over]
    return [TaskSpan(task, first, last) for task, first, last in zip(tasks, begin, end, strict=True)]


def covered(spans: Iterable[TaskSpan]) -> float:
    """Seconds in which at least one of the spans runs."""
    total, until = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span.begin):
        total += max(0.0, span.end - max(span.begin, until))
        until = max(until, span.end)
    return total


def _speeds(running: Sequence[Task], capacity: Mapping[str, float]) -> list[float]:
    used: dict[str, float] = {}
    for task in running:
        for resource, amount in task.needs.items():
            used[resource] = used.get(resource, 0.0) + amount
    crowding = {resource: max(1.0, amount / capacity[resource]) for resource, amount in used.items()}
    return [1.0 / max((crowding[resource] for resource in task.needs), default=1.0) for task in running]
