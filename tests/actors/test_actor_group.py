from typing import Any

import pytest

from rlhf_ray.actors.group import ActorGroup


class Method:
    """Stands where an actor and its method do, and gives back what it is called with."""

    def __getattr__(self, name: str) -> Any:
        return Method() if name != "remote" else lambda *arguments: arguments


def test_each_share_goes_to_all_ranks_that_work_on_it() -> None:
    group = ActorGroup("policy", [Method() for _ in range(6)], sequence_parallel=3)
    assert (len(group), group.shares) == (6, 2)
    assert group.call_each("update", [("a", 1), ("b", 2)]) == [("a", 1)] * 3 + [("b", 2)] * 3


def test_every_rank_has_a_share_of_its_own_by_default() -> None:
    group = ActorGroup("policy", [Method(), Method()])
    assert group.call_each("update", [("a",), ("b",)]) == [("a",), ("b",)]
    with pytest.raises(ValueError, match="shorter"):
        group.call_each("update", [("a",)])
