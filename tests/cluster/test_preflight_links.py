"""How long the preflight waits until processes on several nodes have met."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.cluster.preflight import network
from rlhf_ray.cluster.preflight.network import Backend, _broadcast, link_probes
from rlhf_ray.cluster.preflight.run import LIMIT_S
from rlhf_ray.cluster.topology import Node
from rlhf_ray.config.loading import parse_config

NODES = [Node(name, {}, {}, {}, f"id-{name}") for name in ("a", "b")]


class Group:
    """Probes that answer what they are asked, and tell how long they were given."""

    lost: Mapping[str, str] = {}

    def __init__(self) -> None:
        self.asked: list[tuple[str, float, Any]] = []

    def ask(self, method: str, arguments: dict[str, Any], limit_s: float) -> tuple[dict[str, Any], dict[str, str]]:
        self.asked.append((method, limit_s, arguments))
        return {name: ("10.0.0.1", 4000) if method == "address" else (2**20, 0.1) for name in arguments}, {}


VIEW: Any = SimpleNamespace(addresses={"a": "10.0.0.1", "b": "10.0.0.2"})


@pytest.mark.parametrize(("backend", "seconds"), [("gloo", 15.0), ("nccl", 60.0)])
def test_nccl_gets_the_minute_that_its_first_collective_may_take(backend: Backend, seconds: float) -> None:
    group = Group()
    found, problems = _broadcast(VIEW, backend, NODES, group)  # type: ignore[arg-type]
    assert found is not None
    assert problems == []
    assert [limit for _, limit, _ in group.asked] == [seconds] * 2
    assert [given[-1] for given in group.asked[1][2].values()] == [seconds] * 2, "the group's own limit"


@pytest.mark.parametrize(("gpus", "longer"), [(0, 0.0), (1, 45.0)])
def test_the_limit_of_all_checks_leaves_room_for_it(monkeypatch: pytest.MonkeyPatch, gpus: int, longer: float) -> None:
    limits = []

    class Started:
        def __init__(self, *arguments: Any, **_: Any) -> None:
            limits.append(arguments[2])

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(network, "probes", Started)
    monkeypatch.setattr(network, "Deadline", lambda seconds: seconds)
    config = parse_config(
        {
            "job": "sft",
            "name": "n",
            "policy": {"model": "m"},
            "data": {"train": "t", "rows_per_step": 8},
            "placement": {"policy": {"ranks": 2, "gpus": gpus}},
            "run": {"dir": "d"},
        }
    )
    with link_probes(config, {"policy": NODES}, LIMIT_S):
        assert limits == [LIMIT_S + longer]
