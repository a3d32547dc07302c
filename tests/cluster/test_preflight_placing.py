"""Places before they are reserved: everything that does not fit, and the nodes of what does."""

from typing import Any

from rlhf_ray.cluster.preflight.placing import check_placement
from rlhf_ray.cluster.topology import Node
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import parse_config


def node(name: str, cpus: float = 4.0, free: float | None = None, **labels: str) -> Node:
    return Node(name, {"CPU": cpus}, {"CPU": cpus if free is None else free}, labels, f"id-{name}")


def ppo(cluster: dict[str, Any] | None = None, **placement: Any) -> Job:
    return parse_config(
        {
            "job": "ppo",
            "name": "a",
            "cluster": cluster or {},
            "policy": {"model": "m"},
            "reward": [{"model": "m"}],
            "data": {"prompts": "p", "prompts_per_step": 8},
            "rollout": {"sampling": {"max_new_tokens": 8}, "engine": {"max_model_len": 32}},
            "placement": placement,
            "run": {"dir": "r", "steps": 1},
        }
    )


def names(seats: dict[str, tuple[Node, ...]]) -> dict[str, list[str]]:
    return {role: [node.name for node in nodes] for role, nodes in seats.items()}


def test_every_role_that_would_not_even_fit_alone_is_told() -> None:
    config = ppo(policy={"cpus": 99}, rollout={"labels": {"zone": "far"}})
    check, seats = check_placement(config, [node("a"), node("b")])
    assert check.status == "failed"
    assert len(check.problems) == 2
    assert "placement.policy: bundle 0 of 1 (99 CPU) has no node: a has 4 CPU" in check.problems[0]
    assert "has no label zone" in check.problems[1]
    assert names(seats) == {"policy": [], "critic": ["a", "b"], "reference": [], "reward": ["a", "b"], "rollout": []}


def test_what_fits_only_one_by_one_is_one_problem() -> None:
    check, _ = check_placement(ppo(policy={"cpus": 3}, critic={"cpus": 3}), [node("a")])
    assert len(check.problems) == 1


def test_places_and_those_who_share_them_are_told() -> None:
    config = ppo(policy={"labels": {"role": "train"}}, rollout={"labels": {"role": "sample"}, "engines": 2})
    check, seats = check_placement(config, [node("a", role="train"), node("b", role="sample")])
    assert check.status == "ok"
    assert "policy on a" in check.detail
    assert "rollout on b" in check.detail
    assert names(seats)["reference"] == ["a"], "beside the policy"
    assert names(seats)["rollout"] == ["b", "b"]


def test_what_others_hold_is_waited_for() -> None:
    check, _ = check_placement(ppo(), [node("a", free=1.0)])
    assert check.status == "ok"
    assert check.detail.startswith("fits once others have left: ")


def test_an_autoscaler_may_add_what_is_missing() -> None:
    check, _ = check_placement(ppo({"autoscaling": True}, policy={"cpus": 99}), [node("a")])
    assert check.status == "skipped"
    assert check.detail.startswith("the autoscaler has to add nodes: placement.policy")
