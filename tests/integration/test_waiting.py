"""Every wait has a limit, and an error that says what was waited for."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from rlhf_ray.actors.group import ActorGroup
from rlhf_ray.actors.liveness import liveness
from rlhf_ray.actors.rollout import RolloutGroup, RolloutWorker
from rlhf_ray.actors.waiting import (
    ActorDied,
    RoleTimeout,
    TaskFailed,
    fetch_data,
    wait_all,
    wait_any,
    wait_until_made,
)
from rlhf_ray.actors.watched import Watched, actor_class
from rlhf_ray.actors.weight_sync import EngineClient
from rlhf_ray.config.rollout import Rollout, Sampling
from rlhf_ray.config.run import Limit, Timeouts
from rlhf_ray.rewards.errors import RewardError
from rlhf_ray.telemetry.trace import SpanRecorder

LIMIT = Limit(60.0, "no setting: a test")


class Busy(Watched):
    """An actor that answers, is late, raises or dies."""

    def answer(self, value: Any) -> Any:
        return value

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def fail(self) -> None:
        raise ZeroDivisionError("a bug of ours")

    def refuse(self) -> None:
        raise RewardError("sentiment", "it is down", ["u1", "u2"])

    def die(self) -> None:
        os._exit(1)

    def sum_of(self, refs: list[ray.ObjectRef]) -> float:
        return float(sum(part.sum() for part in fetch_data(refs, "parts")))


def start(actors: int) -> ActorGroup:
    return ActorGroup("busy", [actor_class(Busy).options(num_cpus=0).remote() for _ in range(actors)])


@pytest.fixture(scope="module")
def pair() -> Iterator[ActorGroup]:
    group = start(2)
    yield group
    group.kill()


def ref(group: ActorGroup, rank: int, method: Callable[..., Any], *arguments: Any) -> ray.ObjectRef:
    """To what one rank's method gives."""
    return group.call_rank(rank, method, *arguments).refs[0]


def wait(refs: list[ray.ObjectRef], timeout_s: float = 30.0) -> list[Any]:
    return wait_all(refs, timeout_s, "busy: work", "run.timeouts.update_s")


def test_results_come_in_rank_order(pair: ActorGroup) -> None:
    late, early = pair.call_each(Busy.answer, [("first",), ("second",)]).refs
    assert wait([late, early, late]) == ["first", "second", "first"]
    assert pair.call_rank(3, Busy.answer, 7).wait(LIMIT) == [7]


def test_a_limit_names_what_was_waited_for_and_the_setting(pair: ActorGroup) -> None:
    with pytest.raises(
        RoleTimeout, match=r"waited 0.3 s for busy: work in vain.*raise run.timeouts.update_s"
    ) as caught:
        wait(pair.call(Busy.sleep, 2.0).refs, timeout_s=0.3)
    assert (caught.value.what, caught.value.seconds) == ("busy: work", 0.3)


def test_an_unexpected_exception_is_named_with_its_traceback(pair: ActorGroup) -> None:
    with pytest.raises(TaskFailed, match=r"(?s)busy: work failed: ZeroDivisionError: a bug of ours.*in fail"):
        wait(pair.call(Busy.fail).refs)


def test_this_packages_own_exceptions_come_as_they_were_raised(pair: ActorGroup) -> None:
    with pytest.raises(RewardError, match="it is down") as caught:
        wait(pair.call(Busy.refuse).refs)
    assert (caught.value.part, caught.value.samples) == ("sentiment", ("u1", "u2"))


def test_a_dead_process_is_a_failure_and_no_hang() -> None:
    with pytest.raises(ActorDied, match=r"died while this was waited for: busy: work\. The cause: its process died"):
        wait(start(1).call(Busy.die).refs)


def test_the_first_failure_ends_the_wait_for_its_peers(pair: ActorGroup) -> None:
    pair.call(Busy.answer, 0).wait(LIMIT)
    slow = ref(pair, 0, Busy.sleep, 2.0)
    with pytest.raises(TaskFailed, match="ZeroDivisionError"):
        wait([slow, ref(pair, 1, Busy.fail)])
    done, _ = ray.wait([slow], timeout=0)
    assert not done


def test_a_failure_from_before_the_wait_ends_it_too(pair: ActorGroup) -> None:
    pair.call(Busy.answer, 0).wait(LIMIT)
    failed = ref(pair, 1, Busy.refuse)
    ray.wait([failed], timeout=30)
    slow = ref(pair, 0, Busy.sleep, 2.0)
    with pytest.raises(RewardError, match="it is down"):
        wait([slow, failed])
    done, _ = ray.wait([slow], timeout=0)
    assert not done


def test_actors_fetch_from_actors(pair: ActorGroup) -> None:
    refs = [ray.put(np.ones(3)), ref(pair, 1, Busy.answer, np.full(2, 2.0))]
    assert wait([ref(pair, 0, Busy.sum_of, refs)]) == [7.0]


def test_an_actor_whose_data_failed_says_so(pair: ActorGroup) -> None:
    with pytest.raises(RewardError, match="it is down"):
        wait([ref(pair, 0, Busy.sum_of, [ref(pair, 1, Busy.refuse)])])


class Receiver:
    """A rollout actor's side of a weight sync that fails after a while."""

    def start_update(self) -> None:
        pass

    def update(self, update_info: dict[str, Any]) -> None:
        time.sleep(update_info["after_s"])
        raise MemoryError("no room for the 7th layer")


@pytest.fixture(scope="module")
def receiver() -> Iterator[Any]:
    actor = ray.remote(Receiver).options(num_cpus=0).remote()
    yield actor
    ray.kill(actor)


def test_a_trainer_in_a_broadcast_hears_of_an_engine_that_fails(receiver: Any) -> None:
    client = EngineClient([receiver], 1, timeout_s=60.0)
    client.beside(client.start_weight_update)

    def send() -> None:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(client.update_weights, {"after_s": 0.5})
            threading.Event().wait(20)  # as in a collective that nobody joins

    began = time.monotonic()
    with pytest.raises(TaskFailed, match="rollout: update failed: MemoryError: no room for the 7th layer"):
        client.beside(send)
    assert time.monotonic() - began < 10


def test_an_engine_that_fails_is_told_before_the_broken_connection_that_it_leaves(receiver: Any) -> None:
    client = EngineClient([receiver], 1, timeout_s=60.0)

    def send() -> None:
        ThreadPoolExecutor(1).submit(client.update_weights, {"after_s": 1.0})
        while not client._calling:
            time.sleep(0.01)
        raise ConnectionError("closed by peer")

    with pytest.raises(TaskFailed, match="rollout: update failed: MemoryError: no room for the 7th layer"):
        client.beside(send)


def test_a_trainer_that_fails_by_itself_says_so(receiver: Any) -> None:
    client = EngineClient([receiver], 1, timeout_s=60.0)
    with pytest.raises(AssertionError, match="weights came as"):
        client.beside(_raise)


def _raise() -> None:
    raise AssertionError("weights came as float16, announced as float32")


class Parent(Busy):
    """An actor that is watched, with a process of its own that it can't work without."""

    def __init__(self) -> None:
        self.recorder = SpanRecorder()
        self._child = subprocess.Popen(["sleep", "60"])

    def pids(self) -> tuple[int, int]:
        return os.getpid(), self._child.pid

    def find_lost_process(self) -> str | None:
        return None if self._child.poll() is None else "its child died"

    def late(self, seconds: float) -> str:
        time.sleep(seconds)
        return "late"

    def collective(self) -> None:
        """Fails as peers of a dead rank do."""
        time.sleep(0.3)
        raise RuntimeError("Connection closed by peer")


@pytest.fixture
def watched() -> Iterator[ActorGroup]:
    """Three actors that are to live."""
    group = ActorGroup("worker", [actor_class(Parent).options(num_cpus=0).remote() for _ in range(3)])
    liveness.watch("worker", group.actors)
    group.call(Busy.answer, 0).wait(LIMIT)
    yield group
    group.kill()
    assert not len(liveness)


def pids_of(group: ActorGroup) -> list[tuple[int, int]]:
    return group.call(Parent.pids).wait(LIMIT)


@pytest.mark.parametrize(
    ("lost", "wait_for"), [("actor", wait_all), ("child", wait_all), ("child", wait_any), ("actor", wait_until_made)]
)
def test_a_death_is_told_whoever_is_waited_for(watched: ActorGroup, lost: str, wait_for: Any) -> None:
    actor, child = pids_of(watched)[1]
    slow = ref(watched, 0, Busy.sleep, 20.0)
    os.kill(actor if lost == "actor" else child, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(ActorDied, match=r"^worker/1 died while this was waited for: somebody else") as caught:
        wait_for([slow], 60.0, "somebody else", "")
    assert time.monotonic() - began < 5
    assert (caught.value.role, caught.value.rank, caught.value.what) == ("worker", 1, "somebody else")
    assert ("its child died" in caught.value.reason) == (lost == "child")
    # It is told once: what follows is ending the others in order.
    assert wait_all([ref(watched, 2, Busy.answer, 5)], 30.0, "", "") == [5]


def test_a_wait_that_goes_on_for_several_looks_ends_with_its_results(watched: ActorGroup) -> None:
    slow, quick = ref(watched, 0, Parent.late, 2.5), ref(watched, 1, Busy.answer, "quick")
    assert wait([slow, quick, slow]) == ["late", "quick", "late"]
    wait_until_made([slow, quick, slow], 30.0, "", "")


def test_what_peers_say_of_a_dead_rank_is_not_taken_for_the_cause(watched: ActorGroup) -> None:
    os.kill(pids_of(watched)[2][0], signal.SIGKILL)
    with pytest.raises(ActorDied, match="^worker/2 died"):
        wait([ref(watched, 0, Parent.collective)])


def test_a_failure_of_a_watched_actor_has_its_name(watched: ActorGroup) -> None:
    with pytest.raises(TaskFailed, match="busy: work failed in worker/1: ZeroDivisionError: a bug of ours") as caught:
        wait([ref(watched, 1, Busy.fail)])
    assert (caught.value.role, caught.value.rank) == ("worker", 1)
    assert caught.value.cause == "ZeroDivisionError: a bug of ours"
    assert "in fail" in caught.value.trace


def test_a_death_that_another_actor_noticed_gets_its_name(watched: ActorGroup) -> None:
    pid = pids_of(watched)[1][0]
    asking = ref(watched, 0, Busy.sum_of, [ref(watched, 1, Busy.sleep, 20.0)])
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ActorDied, match="^worker/1 died"):
        wait([asking])


def test_who_is_ended_as_planned_is_not_missed(watched: ActorGroup) -> None:
    ActorGroup("worker", watched.actors[1:]).kill()
    with pytest.raises(RoleTimeout):
        wait([ref(watched, 0, Busy.sleep, 20.0)], timeout_s=3.0)


class StartingEngine(RolloutWorker):
    """Starts for ever, in a process of its own and in the actor's event loop, as vLLM does for half a minute."""

    async def load_model(self, *_: Any) -> None:
        subprocess.Popen(["sleep", "60"])
        time.sleep(60)


def test_an_engine_that_is_still_starting_ends_with_its_processes() -> None:
    actor = actor_class(StartingEngine).options(num_cpus=0).remote(0)
    rollout = Rollout(sampling=Sampling(max_new_tokens=1))
    engines = RolloutGroup([actor], rollout, deterministic=False, timeouts=Timeouts())
    [activity] = engines.call(RolloutWorker.activity).wait(LIMIT)
    starting = engines.call(RolloutWorker.load_model, None)
    deadline = time.monotonic() + 30
    while not (children := psutil.Process(activity.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    [said] = engines.end_engines(0.5)
    assert "did not answer within 0.5 s" in said
    assert [child.status() for child in children] == [psutil.STATUS_ZOMBIE]  # its parent is busy
    assert not ray.wait(starting.refs, timeout=0)[0]
    engines.kill()
