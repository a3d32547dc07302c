"""A role without a place is an error that says what does not fit, before any model is loaded."""

import time
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import remove_placement_group

from rlhf_ray.cluster.placement import PlacementError, reserve
from rlhf_ray.controllers.train import train
from runs import MakeConfig


def test_a_bundle_that_no_node_has_is_named(tmp_path: Path, ppo_config: MakeConfig) -> None:
    config = ppo_config(tmp_path / "run", "placement.critic.cpus=99", "placement.placement_timeout_s=1")
    began = time.monotonic()
    with pytest.raises(PlacementError) as caught:
        train(config)
    assert time.monotonic() - began < 15
    assert (caught.value.role, caught.value.bundle) == ("critic", 0)
    message = str(caught.value)
    assert "placement.critic: bundle 0 of 1 needs 99 CPU on one node, which no node has" in message
    assert "has 4 CPU" in message, "what the cluster has"


def test_bundles_that_fit_only_one_by_one_are_counted() -> None:
    with pytest.raises(
        PlacementError, match=r"3 bundles with 9 CPU in all \(PACK\) were not placed within 1 s"
    ) as caught:
        reserve("policy", [{"CPU": 3.0}] * 3, "PACK", timeout_s=1)
    assert caught.value.bundle is None


def test_a_role_that_was_not_placed_holds_nothing() -> None:
    with pytest.raises(PlacementError):
        reserve("policy", [{"CPU": 3.0}] * 3, "PACK", timeout_s=1)
    whole = reserve("policy", [{"CPU": ray.cluster_resources()["CPU"]}], "PACK", timeout_s=20)
    remove_placement_group(whole)


def test_two_jobs_may_reserve_places_for_the_same_role() -> None:
    for places in [reserve("policy", [{"CPU": 1.0}], "PACK", timeout_s=20) for _ in range(2)]:
        remove_placement_group(places)
