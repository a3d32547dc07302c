"""Waiting for actors: always with a limit, and stopping at the first failure."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError


class RoleTimeout(Exception):
    """Actors did not answer in time.

    Attributes:
        what: what was waited for.
        seconds: how long.
    """

    def __init__(self, what: str, seconds: float, setting: str) -> None:
        self.what, self.seconds, self.setting = what, seconds, setting
        super().__init__(
            f"waited {seconds:g} s for {what} in vain; if it is slow rather than stuck, raise {setting} "
            "(`ray stack` on its node shows what it does)"
        )

    def __reduce__(self) -> tuple[type["RoleTimeout"], tuple[str, float, str]]:
        return type(self), (self.what, self.seconds, self.setting)


class RoleFailure(Exception):
    """An actor died or raised something unexpected.

    Attributes:
        what: what it was doing.
    """

    def __init__(self, what: str, reason: str) -> None:
        self.what, self.reason = what, reason
        super().__init__(f"{what} failed: {reason}")

    def __reduce__(self) -> tuple[type["RoleFailure"], tuple[str, str]]:
        return type(self), (self.what, self.reason)


def wait_all(refs: Sequence[ray.ObjectRef], timeout_s: float, what: str, setting: str) -> list[Any]:
    """The results, in order. The first failure ends the wait at once: its peers may hang in a collective.

    Args:
        timeout_s: for all of them together.
        what: for errors, such as `policy: update`.
        setting: config key of the limit, for errors.

    Raises:
        RoleTimeout: after `timeout_s`.
        RoleFailure: when an actor died or raised an exception that is not this package's.
        Exception: this package's own exceptions as they were raised in the actor.
    """
    try:
        with _named_failures(what):
            # One call for all of them, which raises the first failure while others are still awaited.
            results: list[Any] = ray.get(list(refs), timeout=timeout_s)
            return results
    except GetTimeoutError:
        raise RoleTimeout(what, timeout_s, setting) from None


def fetch(ref: ray.ObjectRef, what: str) -> Any:
    """The value of a reference that is ready.

    Raises:
        As `wait_all`.
    """
    try:
        with _named_failures(what):
            return ray.get(ref, timeout=60)
    except GetTimeoutError as error:
        raise RoleFailure(what, f"its result could not be fetched: {error}") from None


@contextmanager
def _named_failures(what: str) -> Iterator[None]:
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Exception) and type(cause).__module__.startswith("rlhf_ray."):
            raise cause from None
        raise RoleFailure(what, f"{type(cause).__name__}: {cause}\n{error}") from None  # Ray's text is the traceback
    except RayActorError as error:
        raise RoleFailure(what, f"its process died. {error}") from None
    except GetTimeoutError:
        raise
    except RayError as error:
        raise RoleFailure(what, str(error)) from None


def fetch_data(refs: Sequence[ray.ObjectRef], what: str) -> list[Any]:
    """Objects that other actors have made or are making, from within an actor.

    The controller's own limit ends a wait sooner; this one keeps an actor from outliving a lost controller.
    """
    return wait_all(refs, 3600.0, what, "the limit of this phase in run.timeouts")
