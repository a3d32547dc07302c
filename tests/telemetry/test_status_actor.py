"""A status actor asks each actor one question at a time, and knows the dead from the silent."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, ActorPlacementGroupRemoved, ActorUnavailableError

from rlhf_ray.telemetry import status_actor
from rlhf_ray.telemetry.status import Activity, ActorRecord, ActorState
from rlhf_ray.telemetry.status_actor import _Watched

SAID = Activity("update", 90.0, "10.0.0.1", "node", 7, 2**30)

Answer = Callable[[], Awaitable[Activity]]


class Actor:
    """What a status actor sees of an actor: it gives answers one after the other."""

    def __init__(self, *answers: Answer) -> None:
        self.asked = 0
        self._answers = list(answers)
        self.activity = SimpleNamespace(remote=self._remote)

    def _remote(self) -> Awaitable[Activity]:
        self.asked += 1
        return self._answers[min(self.asked, len(self._answers)) - 1]()


async def says() -> Activity:
    return SAID


def raises(error: Exception) -> Answer:
    async def answer() -> Activity:
        raise error

    return answer


def states(actor: Actor, times: int) -> tuple[list[ActorState], ActorRecord]:
    """The state after each of several looks at an actor."""
    record = ActorRecord("policy", 0)

    async def look() -> list[ActorState]:
        watched, seen = _Watched(record, actor), []
        for _ in range(times):
            await watched.ask()
            seen.append(record.status.state)
        return seen

    return asyncio.run(look()), record


def test_an_actor_that_answers_is_asked_at_each_look() -> None:
    actor = Actor(says)
    assert states(actor, 3)[0] == ["up", "up", "up"]
    assert actor.asked == 3


def test_a_stuck_actor_is_asked_once_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_actor, "_PATIENCE_S", 0.01)
    goes_on = asyncio.Event()

    async def stuck() -> Activity:
        await goes_on.wait()
        return SAID

    async def looks() -> list[tuple[ActorState, int]]:
        actor, record, seen = Actor(says, stuck, says), ActorRecord("policy", 0), []
        watched = _Watched(record, actor)
        for look in range(5):
            if look == 3:
                goes_on.set()
            await watched.ask()
            seen.append((record.status.state, actor.asked))
        return seen

    assert asyncio.run(looks()) == [("up", 1), ("silent", 2), ("silent", 2), ("up", 2), ("up", 3)]


def test_two_who_look_at_once_share_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Actor(says)

    async def look() -> None:
        watched = _Watched(ActorRecord("policy", 0), actor)
        await asyncio.gather(watched.ask(), watched.ask())

    asyncio.run(look())
    assert actor.asked == 1


@pytest.mark.parametrize("error", [ActorDiedError(), ActorPlacementGroupRemoved()])
def test_a_dead_actor_is_not_asked_again(error: Exception) -> None:
    actor = Actor(says, raises(error))
    seen, record = states(actor, 4)
    assert seen == ["up", "dead", "dead", "dead"]
    assert actor.asked == 2
    assert record.status.error
    assert record.status.activity == SAID


def test_an_actor_that_is_out_of_reach_for_a_moment_is_silent() -> None:
    assert states(Actor(says, raises(ActorUnavailableError("network", None)), says), 3)[0] == ["up", "silent", "up"]


def test_an_actor_that_cannot_say_is_up_with_its_error() -> None:
    seen, record = states(Actor(raises(RuntimeError("no driver\nTraceback (most recent call last):\n"))), 1)
    assert seen == ["up"]
    assert record.status.error == "RuntimeError: no driver"
