"""Which node each place goes to, and what is said when there is none."""

import pickle
from typing import Any

import pytest

from rlhf_ray.cluster.assignment import PlacementError, Request, assign, matches, requests_of
from rlhf_ray.cluster.topology import Node
from rlhf_ray.config.placement import PPOPlacement


def node(name: str, gpus: float, *, free: float | None = None, **labels: str) -> Node:
    return Node(name, {"GPU": gpus}, {"GPU": gpus if free is None else free}, labels)


def ask(role: str, places: int, gpus: float = 1.0, **more: Any) -> Request:
    return Request(role, places, {"GPU": gpus}, **more)


def names(requests: list[Request], nodes: list[Node]) -> dict[str, str]:
    return {role: "".join(found.name for found in places) for role, places in assign(requests, nodes).items()}


def refused(requests: list[Request], nodes: list[Node]) -> PlacementError:
    with pytest.raises(PlacementError) as caught:
        assign(requests, nodes)
    return caught.value


FOUR_NODES = [node("a", 8), node("b", 8), node("c", 4), node("d", 2)]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (ask("policy", 8), "aaaaaaaa"),
        (ask("policy", 3), "ccc"),  # the tightest node that takes all
        (ask("policy", 10), "aaaaaaaadd"),  # the roomiest, then the tightest for the rest
        (ask("policy", 4, strategy="SPREAD"), "abcd"),
        (ask("policy", 6, strategy="SPREAD"), "aabbcd"),
        (ask("policy", 2, strategy="STRICT_PACK"), "dd"),
        (ask("policy", 3, strategy="STRICT_SPREAD"), "acd"),
        (ask("policy", 8, nodes=2), "aaaacccc"),
        (ask("policy", 12, nodes=2), "aaaaaabbbbbb"),
        (ask("policy", 6, nodes=3), "aaccdd"),
        (ask("rollout", 3, gpus=4), "aac"),  # an engine of four workers is never divided
        (ask("policy", 24, block=4), None),
    ],
)
def test_each_strategy_takes_the_nodes_that_it_promises(request_: Request, expected: str | None) -> None:
    if expected is None:
        assert refused([request_], FOUR_NODES).bundle == 20
    else:
        assert names([request_], FOUR_NODES) == {request_.role: expected}


def test_ranks_on_one_node_follow_each_other() -> None:
    for strategy in ("PACK", "SPREAD"):
        found = names([ask("policy", 14, strategy=strategy)], FOUR_NODES)["policy"]
        assert found == "".join(sorted(found))


def test_engines_on_the_places_of_ranks_share_a_node() -> None:
    nodes = [node("a", 3), node("b", 3)]
    assert names([ask("policy", 4, block=2)], nodes) == {"policy": "aabb"}
    assert names([ask("policy", 4)], nodes) == {"policy": "aaab"}


def test_roles_with_few_choices_choose_first() -> None:
    nodes = [node("a", 4, disk="nvme"), node("b", 4)]
    free, bound = ask("policy", 4), ask("critic", 4, labels={"disk": "nvme"})
    assert names([free, bound], nodes) == {"policy": "bbbb", "critic": "aaaa"}


def test_every_order_of_roles_is_tried() -> None:
    # Taking the tightest node for each in turn leaves the last without one.
    nodes = [node("a", 4), node("b", 6)]
    requests = [
        ask("policy", 3, strategy="STRICT_PACK"),
        ask("critic", 3, strategy="STRICT_PACK"),
        ask("rollout", 1, 4),
    ]
    assert sorted(names(requests, nodes)["rollout"]) == ["a"]


@pytest.mark.parametrize(
    ("selector", "value", "met"),
    [
        ("h100", "h100", True),
        ("h100", "a100", False),
        ("h100", None, False),
        ("!h100", "a100", True),
        ("!h100", None, True),
        ("in(h100, h200)", "h200", True),
        ("in(h100,h200)", "a100", False),
        ("!in(h100, h200)", "h200", False),
        ("!in(h100, h200)", None, True),
    ],
)
def test_label_selectors_mean_what_ray_means(selector: str, value: str | None, met: bool) -> None:
    assert matches(selector, value) is met


def test_what_is_free_counts_and_not_what_there_is() -> None:
    nodes = [node("a", 8, free=1), node("b", 8)]
    assert names([ask("policy", 2)], nodes) == {"policy": "bb"}


def test_shares_of_a_device_add_up() -> None:
    assert names([ask("policy", 3, 0.3333), ask("critic", 3, 0.3333)], [node("a", 2)]) == {
        "policy": "aaa",
        "critic": "aaa",
    }


MESSAGES = [
    (
        [ask("policy", 2), ask("critic", 9)],
        [node("10.0.0.1", 4), node("10.0.0.2", 4, free=3)],
        "placement.critic: bundle 5 of 9 (1 GPU) has no node: 10.0.0.1 has 0 of 4 GPU free; 10.0.0.2 has 0 of 4 GPU "
        "free. Ask for less in placement.critic, wait for what other jobs hold, or add nodes (on one machine, "
        "cluster.cpus sets how many CPUs Ray counts)",
    ),
    (
        [Request("rollout", 1, {"GPU": 4.0, "fast_disk": 1.0})],
        [node("10.0.0.1", 8), node("10.0.0.2", 2)],
        "placement.rollout: bundle 0 of 1 (4 GPU, 1 fast_disk) has no node: 10.0.0.1 has 0 fast_disk; 10.0.0.2 has 2 "
        "GPU. Ask",
    ),
    (
        [ask("policy", 4, labels={"zone": "in(x, y)"})],
        [node("10.0.0.1", 8, zone="z"), node("10.0.0.2", 8)],
        "placement.policy: bundle 0 of 4 (1 GPU, zone=in(x, y)) has no node: 10.0.0.1 has z as zone; 10.0.0.2 has no "
        "label zone. Ask",
    ),
    (
        [ask("policy", 8, nodes=2)],
        [node("10.0.0.1", 8), node("10.0.0.2", 8, free=3)],
        "placement.policy: bundle 4 of 8 (1 GPU, 4 on each node) has no node: 10.0.0.1 takes 4; 10.0.0.2 has 3 of 8 "
        "GPU free. Ask",
    ),
    ([ask("policy", 1)], [], "placement.policy: bundle 0 of 1 (1 GPU) has no node: the cluster has none. Ask"),
]


@pytest.mark.parametrize(("requests", "nodes", "message"), MESSAGES)
def test_the_error_names_role_bundle_node_and_resource(
    requests: list[Request], nodes: list[Node], message: str
) -> None:
    error = refused(requests, nodes)
    assert str(error).startswith(message)
    assert error.role == message.split(":")[0].removeprefix("placement.")
    assert set(error.lacking) == {found.name for found in nodes}
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.lacking) == (str(error), error.lacking), "it crosses processes whole"


def test_a_config_asks_for_places_of_roles_that_have_their_own() -> None:
    placement = PPOPlacement.model_validate(
        {
            "policy": {"ranks": 4, "gpus": 1, "cpus": 2, "resources": {"fast_disk": 0.5}, "nodes": 2},
            "critic": {"ranks": 2, "cpus": 0},
            "rollout": {"colocate": "policy", "engines": 2, "tensor_parallel": 2},
        }
    )
    roles = ("policy", "critic", "reference", "reward", "rollout")
    assert requests_of({role: getattr(placement, role) for role in roles}) == [
        Request("policy", 4, {"CPU": 2.0, "GPU": 1.0, "fast_disk": 0.5}, nodes=2, block=2),
        Request("critic", 2, {"CPU": 0.001}),
    ]
    apart = PPOPlacement.model_validate(
        {"rollout": {"engines": 2, "tensor_parallel": 2, "gpus": 1, "labels": {"a": "b"}}}
    )
    assert requests_of({"rollout": apart.rollout}) == [
        Request("rollout", 2, {"CPU": 2.0, "GPU": 2.0}, labels={"a": "b"})
    ]
