"""Every wait has a limit, and an error that says what was waited for."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import ray

from rlhf_ray.actors.group import ActorGroup
from rlhf_ray.actors.waiting import RoleFailure, RoleTimeout, fetch_data, wait_all
from rlhf_ray.actors.weight_sync import EngineClient
from rlhf_ray.rewards.errors import RewardError


class Busy:
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
    return ActorGroup("busy", [ray.remote(Busy).options(num_cpus=0).remote() for _ in range(actors)])


@pytest.fixture(scope="module")
def pair() -> Iterator[ActorGroup]:
    group = start(2)
    yield group
    group.kill()


def wait(refs: list[ray.ObjectRef], timeout_s: float = 30.0) -> list[Any]:
    return wait_all(refs, timeout_s, "busy: work", "run.timeouts.update_s")


def test_results_come_in_rank_order(pair: ActorGroup) -> None:
    late, early = pair.call_each("answer", [("first",), ("second",)])
    assert wait([late, early, late]) == ["first", "second", "first"]
    assert ray.get(pair.call_one(3, "answer", 7), timeout=30) == 7


def test_a_limit_names_what_was_waited_for_and_the_setting(pair: ActorGroup) -> None:
    with pytest.raises(
        RoleTimeout, match=r"waited 0.3 s for busy: work in vain.*raise run.timeouts.update_s"
    ) as caught:
        wait(pair.call("sleep", 2.0), timeout_s=0.3)
    assert (caught.value.what, caught.value.seconds) == ("busy: work", 0.3)


def test_an_unexpected_exception_is_named_with_its_traceback(pair: ActorGroup) -> None:
    with pytest.raises(RoleFailure, match=r"(?s)busy: work failed: ZeroDivisionError: a bug of ours.*in fail"):
        wait(pair.call("fail"))


def test_this_packages_own_exceptions_come_as_they_were_raised(pair: ActorGroup) -> None:
    with pytest.raises(RewardError, match="it is down") as caught:
        wait(pair.call("refuse"))
    assert (caught.value.part, caught.value.samples) == ("sentiment", ("u1", "u2"))


def test_a_dead_process_is_a_failure_and_no_hang() -> None:
    with pytest.raises(RoleFailure, match="busy: work failed: its process died"):
        wait(start(1).call("die"))


def test_the_first_failure_ends_the_wait_for_its_peers(pair: ActorGroup) -> None:
    pair.run("answer", 0, timeout_s=60, setting="")
    slow = pair.call_one(0, "sleep", 2.0)
    with pytest.raises(RoleFailure, match="ZeroDivisionError"):
        wait([slow, pair.call_one(1, "fail")])
    done, _ = ray.wait([slow], timeout=0)
    assert not done


def test_a_failure_from_before_the_wait_ends_it_too(pair: ActorGroup) -> None:
    pair.run("answer", 0, timeout_s=60, setting="")
    failed = pair.call_one(1, "refuse")
    ray.wait([failed], timeout=30)
    slow = pair.call_one(0, "sleep", 2.0)
    with pytest.raises(RewardError, match="it is down"):
        wait([slow, failed])
    done, _ = ray.wait([slow], timeout=0)
    assert not done


def test_actors_fetch_from_actors(pair: ActorGroup) -> None:
    refs = [ray.put(np.ones(3)), pair.call_one(1, "answer", np.full(2, 2.0))]
    assert wait([pair.call_one(0, "sum_of", refs)]) == [7.0]


def test_an_actor_whose_data_failed_says_so(pair: ActorGroup) -> None:
    with pytest.raises(RewardError, match="it is down"):
        wait([pair.call_one(0, "sum_of", [pair.call_one(1, "refuse")])])


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
    with pytest.raises(RoleFailure, match="rollout: update failed: MemoryError: no room for the 7th layer"):
        client.beside(send)
    assert time.monotonic() - began < 10


def test_an_engine_that_fails_is_told_before_the_broken_connection_that_it_leaves(receiver: Any) -> None:
    client = EngineClient([receiver], 1, timeout_s=60.0)

    def send() -> None:
        ThreadPoolExecutor(1).submit(client.update_weights, {"after_s": 1.0})
        while not client._calling:
            time.sleep(0.01)
        raise ConnectionError("closed by peer")

    with pytest.raises(RoleFailure, match="rollout: update failed: MemoryError: no room for the 7th layer"):
        client.beside(send)


def test_a_trainer_that_fails_by_itself_says_so(receiver: Any) -> None:
    client = EngineClient([receiver], 1, timeout_s=60.0)
    with pytest.raises(AssertionError, match="weights came as"):
        client.beside(_raise)


def _raise() -> None:
    raise AssertionError("weights came as float16, announced as float32")
