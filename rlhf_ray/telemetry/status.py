"""What a run does right now: the facts that its processes tell, and the snapshot that is made of them.

Each process says itself what it does, whenever it is asked, from the spans that it records anyway. Whether it is alive,
Ray says: a call to a dead actor fails with the reason. Nothing is reported while nobody asks, except by the driver,
which is no actor and can't be asked.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rlhf_ray.telemetry.trace import OpenSpan

ActorState = Literal["starting", "up", "silent", "dead"]


@dataclass(frozen=True)
class Activity:
    """What one process says of itself.

    Attributes:
        phase: what it works on, empty when it waits for work.
        since_s: when that began, seconds since the epoch.
        node: address of its node.
        node_id: Ray's id of the node.
        pid: of the process.
        host_bytes: host memory of the process and its children.
        device_bytes: of its devices, in use by whichever process and in all; None without a device.
        running, waiting: requests of a rollout engine that it works on, and that wait for a place; None elsewhere.
        version: of the weights that a rollout engine samples with; None elsewhere.
    """

    phase: str
    since_s: float
    node: str
    node_id: str
    pid: int
    host_bytes: int
    device_bytes: tuple[int, int] | None = None
    running: int | None = None
    waiting: int | None = None
    version: int | None = None


@dataclass(frozen=True)
class ActorStatus:
    """What is known of one actor.

    Attributes:
        state: `starting` until it has answered for the first time, `up`, `silent` when it does not answer though Ray
            holds it for alive, `dead`.
        heard_s: when it last answered, seconds since the epoch; None before the first time.
        activity: what it said then.
        error: why it is dead, or why it could not say what it does; else empty.
    """

    role: str
    rank: int
    state: ActorState
    heard_s: float | None
    activity: Activity | None
    error: str

    @property
    def name(self) -> str:
        """`role/rank`."""
        return f"{self.role}/{self.rank}"


@dataclass(frozen=True)
class Shards:
    """Shards of the step's samples: without an engine yet, at an engine, and complete."""

    waiting: int = 0
    generating: int = 0
    generated: int = 0


@dataclass(frozen=True)
class About:
    """Which run it is.

    Attributes:
        status_actor: name of the run's status actor, a word of its own for each session.
        run_dir: folder of the run, absolute.
        address: of the Ray cluster.
        node, pid: of the driver.
        started_s: seconds since the epoch.
        steps: of the whole run.
    """

    status_actor: str
    name: str
    job: str
    run_dir: str
    address: str
    node: str
    pid: int
    started_s: float
    steps: int


@dataclass(frozen=True)
class Progress:
    """How far the driver is.

    Attributes:
        step: the last complete one.
        phase: what it waits for or does, empty between phases.
        since_s: when that began, seconds since the epoch.
        shards: of the step that goes on; None in jobs that generate nothing.
        metrics: of the last complete step.
    """

    step: int
    phase: str
    since_s: float
    shards: Shards | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunStatus:
    """A run that has a driver.

    Attributes:
        now_s: when this was asked, seconds since the epoch.
        metrics_urls: where Prometheus finds the metrics of the cluster's nodes, the driver's first.
        progress: None before the driver has told anything.
        heard_s: when the driver last told something.
        actors: roles by name, each in rank order.
    """

    now_s: float
    about: About
    progress: Progress | None
    heard_s: float
    actors: tuple[ActorStatus, ...]
    metrics_urls: tuple[str, ...] = ()

    @property
    def state(self) -> Literal["running"]:
        """As a run's folder tells it of one that is over."""
        return "running"

    @property
    def run_dir(self) -> str:
        """Folder of the run, absolute."""
        return self.about.run_dir

    @property
    def last_error(self) -> str:
        """Of the first actor that has one; empty when all are well."""
        return next((f"{actor.name}: {actor.error}" for actor in self.actors if actor.error), "")


def phase_of(going_on: Sequence[OpenSpan], idle_since_s: float) -> tuple[str, float]:
    """Name and start of the innermost work; an empty name and `idle_since_s` when there is none.

    Pieces of one kind that go on side by side (shards that an engine generates) are one phase, which began with the
    first of them.
    """
    if not going_on:
        return "", idle_since_s
    name = going_on[-1].name
    return name, min(span.start_s for span in going_on if span.name == name)


_TRACEBACK = re.compile(r"^\s*(\x1b\[\d+m)*(ray::|Traceback \(most recent call last\))", re.MULTILINE)


def without_traceback(text: str) -> str:
    """An error's words up to where the traceback of an actor begins."""
    found = _TRACEBACK.search(text)
    return (text[: found.start()] if found else text).strip()


class ActorRecord:
    """What a status actor knows of one actor, from its answers and failures to answer.

    Attributes:
        status: all of it.
    """

    def __init__(self, role: str, rank: int) -> None:
        self.status = ActorStatus(role, rank, "starting", heard_s=None, activity=None, error="")

    def answered(self, activity: Activity, now_s: float) -> None:
        """It said what it does."""
        self.status = replace(self.status, state="up", heard_s=now_s, activity=activity, error="")

    def unanswered(self) -> None:
        """It did not answer in time, which is only to be expected while it starts."""
        if self.status.state == "up":
            self.status = replace(self.status, state="silent")

    def failed(self, error: str, now_s: float) -> None:
        """It answered with an error: it is alive and can't say what it does."""
        self.status = replace(self.status, state="up", heard_s=now_s, error=error)

    def died(self, error: str) -> None:
        """Ray says that it is dead."""
        self.status = replace(self.status, state="dead", error=error)
