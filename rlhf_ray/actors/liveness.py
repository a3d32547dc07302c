"""Who of a job must be alive, and who has died, whatever the job is at and whoever is waited for."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from rlhf_ray.telemetry.status import without_traceback


@dataclass(frozen=True)
class ActorName:
    """An actor as the status and the errors call it."""

    role: str
    rank: int

    def __str__(self) -> str:
        return f"{self.role}/{self.rank}"


@dataclass(frozen=True)
class Death:
    """An actor died, or a process that it can't work without.

    Attributes:
        reason: in words.
    """

    name: ActorName
    reason: str


class Liveness:
    """Knows the actors that this process started, from their start until they are ended as planned.

    Each of them is asked `Watched.lost_process`, which has no answer while the actor and its processes are well; the
    call fails when the actor dies. So nothing is sent while all is well, and a death is known about a second after it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[ray.ObjectRef, ActorName] = {}
        self._names: dict[str, ActorName] = {}

    def watch(self, role: str, actors: Sequence[Any]) -> None:
        """These are the ranks of a role, from now on."""
        for rank, actor in enumerate(actors):
            name, question = ActorName(role, rank), actor.lost_process.remote()
            with self._lock:
                self._names[_id(actor)] = name
                self._asked[question] = name

    def forget(self, actors: Sequence[Any]) -> None:
        """These actors are about to end as planned."""
        with self._lock:
            gone = {name for actor in actors if (name := self._names.pop(_id(actor), None)) is not None}
            self._asked = {question: name for question, name in self._asked.items() if name not in gone}

    def name_of(self, actor_id: str | None) -> ActorName | None:
        """The actor with this id of Ray's, None when it is not watched here."""
        return None if actor_id is None else self._names.get(actor_id)

    def told(self, name: ActorName) -> None:
        """The death of this actor is known otherwise; it is not to be told again."""
        with self._lock:
            self._asked = {question: who for question, who in self._asked.items() if who != name}

    def __len__(self) -> int:
        return len(self._asked)

    def death(self, patience_s: float = 0.0) -> Death | None:
        """A death that was not told yet, None when all live.

        Args:
            patience_s: how long to wait for one.
        """
        with self._lock:
            asked = list(self._asked)
        if not asked:
            return None
        answered, _ = ray.wait(asked, num_returns=1, timeout=patience_s)
        if not answered:
            return None
        with self._lock:
            name = self._asked.pop(answered[0], None)
        return None if name is None else Death(name, _reason(answered[0]))


def _id(actor: Any) -> str:
    actor_id: str = actor._actor_id.hex()
    return actor_id


def _reason(answered: ray.ObjectRef) -> str:
    try:
        lost: str = ray.get(answered, timeout=10)
    except RayError as error:
        return f"its process died. {without_traceback(str(error))}"
    return lost


liveness = Liveness()
"""Of the actors that this process started, as Ray's connection is the process's own too."""
