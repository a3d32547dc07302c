"""Waiting for actors: always with a limit, stopping at the first failure, and with an eye on all that must be alive.

What can go wrong with an actor has one of three types here. What is done about each today is the same: the run ends,
its actors are ended, and the same command goes on from the newest checkpoint. Exceptions of this package's own (a bad
reward, a loss that is no number) are no failures of actors, and come as they were raised.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rlhf_ray.actors.liveness import Liveness, liveness


class ActorFailure(Exception):
    """Actors did not do what they were asked to."""


class RoleTimeout(ActorFailure):
    """Actors did not answer in time.

    Attributes:
        what: what was waited for.
        seconds: how long.
        setting: config key of the limit.
    """

    def __init__(self, what: str, seconds: float, setting: str) -> None:
        self.what, self.seconds, self.setting = what, seconds, setting
        super().__init__(
            f"waited {seconds:g} s for {what} in vain; if it is slow rather than stuck, raise {setting} "
            "(`ray stack` on its node shows what it does)"
        )

    def __reduce__(self) -> tuple[type["RoleTimeout"], tuple[str, float, str]]:
        return type(self), (self.what, self.seconds, self.setting)


class ActorDied(ActorFailure):
    """An actor died, or a process that it can't work without.

    Attributes:
        role: of the actor; empty in an actor that called another one, which has no name there.
        rank: of the actor within its role; None there too.
        what: what was waited for.
        reason: in words, Ray's own where the actor itself died.
        actor_id: Ray's.
    """

    def __init__(self, role: str, rank: int | None, what: str, reason: str, actor_id: str | None = None) -> None:
        self.role, self.rank, self.what, self.reason, self.actor_id = role, rank, what, reason, actor_id
        who = f"{role}/{rank}" if role else "an actor"
        super().__init__(f"{who} died while this was waited for: {what}. The cause: {reason}")

    def __reduce__(self) -> tuple[type["ActorDied"], tuple[str, int | None, str, str, str | None]]:
        return type(self), (self.role, self.rank, self.what, self.reason, self.actor_id)


class TaskFailed(ActorFailure):
    """An actor raised an exception that nobody foresaw, or its result was lost.

    Attributes:
        role, rank: of the actor; empty and None where they are not known.
        what: what was waited for.
        cause: type and message of the exception.
        trace: the actor's traceback, as Ray writes it.
    """

    def __init__(self, role: str, rank: int | None, what: str, cause: str, trace: str = "") -> None:
        self.role, self.rank, self.what, self.cause, self.trace = role, rank, what, cause, trace
        who = f" in {role}/{rank}" if role and not what.startswith(f"{role}/") else ""
        super().__init__("\n".join(filter(None, [f"{what} failed{who}: {cause}", trace])))

    def __reduce__(self) -> tuple[type["TaskFailed"], tuple[str, int | None, str, str, str]]:
        return type(self), (self.role, self.rank, self.what, self.cause, self.trace)


_LOOK_EVERY_S = 1.0
"""Between two looks at who has died, during a wait."""

_CAUSE_S = 3.0
"""When an exception comes that nobody foresaw, so long for the news that somebody died, which may be its cause."""


def wait_all(refs: Sequence[ray.ObjectRef], timeout_s: float, what: str, setting: str) -> list[Any]:
    """The results, in order. The first failure ends the wait at once: its peers may hang in a collective.

    Args:
        timeout_s: for all of them together.
        what: for errors, such as `policy: update`.
        setting: config key of the limit, for errors.

    Raises:
        RoleTimeout: after `timeout_s`.
        ActorDied: when any watched actor died, also one that is not waited for.
        TaskFailed: when an actor raised an exception that is not this package's.
        Exception: this package's own exceptions as they were raised in the actor.
    """
    refs, limit = list(refs), _Limit(timeout_s, what, setting)
    while True:
        try:
            with _typed_failures(what):
                # One call for all of them, which raises the first failure while others are still awaited.
                results: list[Any] = ray.get(refs, timeout=limit.next_look_s)
                return results
        except GetTimeoutError:
            limit.look()
        each = list(dict.fromkeys(refs))
        ready, _ = ray.wait(each, num_returns=len(each), timeout=0, fetch_local=False)
        if len(ready) == len(each):
            limit.only_fetching()


def wait_any(refs: Sequence[ray.ObjectRef], timeout_s: float, what: str, setting: str) -> ray.ObjectRef:
    """The first of several references that is ready, or has failed.

    Raises:
        RoleTimeout, ActorDied: as `wait_all`.
    """
    return _ready(refs, 1, timeout_s, what, setting)[0]


def wait_until_made(refs: Sequence[ray.ObjectRef], timeout_s: float, what: str, setting: str) -> None:
    """Wait until others have made these objects, or failed to; none is fetched.

    Raises:
        RoleTimeout, ActorDied: as `wait_all`.
    """
    if each := list(dict.fromkeys(refs)):
        _ready(each, len(each), timeout_s, what, setting)


def _ready(refs: Sequence[ray.ObjectRef], count: int, timeout_s: float, what: str, setting: str) -> list[ray.ObjectRef]:
    limit = _Limit(timeout_s, what, setting)
    while True:
        ready: list[ray.ObjectRef]
        ready, _ = ray.wait(list(refs), num_returns=count, timeout=limit.next_look_s, fetch_local=False)
        if len(ready) >= count:
            return ready
        limit.look()


def settle(refs: Sequence[ray.ObjectRef], timeout_s: float) -> list[str]:
    """Give every call until `timeout_s` to end in whatever way, for those that end a job; the errors, in words."""
    if not refs:
        return []
    _, pending = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
    errors = [f"{len(pending)} did not answer within {timeout_s:g} s"] if pending else []
    for ref in set(refs) - set(pending):
        try:
            ray.get(ref, timeout=10)
        except RayError as error:
            errors.append(str(error))
    return errors


def fetch(ref: ray.ObjectRef, what: str) -> Any:
    """The value of a reference that is ready.

    Raises:
        As `wait_all`.
    """
    try:
        with _typed_failures(what):
            return ray.get(ref, timeout=60)
    except GetTimeoutError as error:
        raise TaskFailed("", None, what, f"its result could not be fetched: {error}") from None


def fetch_data(refs: Sequence[ray.ObjectRef], what: str) -> list[Any]:
    """Objects that other actors have made or are making, from within an actor.

    The controller's own limit ends a wait sooner; this one keeps an actor from outliving a lost controller.
    """
    return wait_all(refs, 3600.0, what, "the limit of this phase in run.timeouts")


class _Limit:
    """Of one wait."""

    def __init__(self, timeout_s: float, what: str, setting: str, watched: Liveness = liveness) -> None:
        self._what, self._timeout_s, self._setting, self._watched = what, timeout_s, setting, watched
        self._ends_s = time.monotonic() + timeout_s
        # An actor that waits for others watches nobody. To stop fetching and begin anew would cost it what has arrived.
        self._looks = len(watched) > 0

    @property
    def next_look_s(self) -> float:
        """Seconds from now, 0 at the end."""
        left = max(0.0, self._ends_s - time.monotonic())
        return min(left, _LOOK_EVERY_S) if self._looks else left

    def only_fetching(self) -> None:
        """All is made and only to be fetched, which is not to be interrupted."""
        self._looks = False

    def look(self) -> None:
        """Raise who died, or that it is too late."""
        _raise_death(self._what, 0.0)
        if time.monotonic() >= self._ends_s:
            raise RoleTimeout(self._what, self._timeout_s, self._setting)


def _raise_death(what: str, patience_s: float) -> None:
    if (death := liveness.death(patience_s)) is not None:
        raise ActorDied(death.name.role, death.name.rank, what, death.reason) from None


# Ray writes the actor's id into the error's text, and keeps it nowhere else that survives its journey.
_ACTOR_ID = re.compile(r"\bactor_id=([0-9a-f]+)")


@contextmanager
def _typed_failures(what: str) -> Iterator[None]:
    """The one place where Ray's errors become this package's."""
    try:
        yield
    except GetTimeoutError:
        raise
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ActorDied) and not cause.role:
            raise _death(cause.actor_id, what, cause.reason) from None
        own = isinstance(cause, Exception) and type(cause).__module__.startswith("rlhf_ray.")
        if not own or isinstance(cause, ActorFailure):
            _raise_death(what, _CAUSE_S)  # peers of a rank that died say that a connection was closed
        if own:
            raise cause from None
        named = _ACTOR_ID.search(str(error))
        name = liveness.name_of(named[1]) if named else None
        role, rank = ("", None) if name is None else (name.role, name.rank)
        raise TaskFailed(role, rank, what, f"{type(cause).__name__}: {cause}", str(error)) from None
    except RayActorError as error:
        raise _death(error.actor_id, what, f"its process died. {error}") from None
    except RayError as error:
        _raise_death(what, _CAUSE_S)  # objects are lost with the node of those who made them
        raise TaskFailed("", None, what, str(error)) from None


def _death(actor_id: str | None, what: str, reason: str) -> ActorDied:
    name = liveness.name_of(actor_id)
    if name is None:
        return ActorDied("", None, what, reason, actor_id)
    liveness.told(name)
    return ActorDied(name.role, name.rank, what, reason, actor_id)
