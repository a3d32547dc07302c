"""A role without a place is an error that says what does not fit, before any model is loaded."""

import time
from pathlib import Path

import pytest
import ray

from rlhf_ray.cluster.assignment import PlacementError, Request
from rlhf_ray.cluster.placement import reserve
from rlhf_ray.cluster.preflight.report import PreflightError
from rlhf_ray.controllers.train import train
from runs import MakeConfig


def test_what_no_node_has_is_refused_at_once(tmp_path: Path, ppo_config: MakeConfig) -> None:
    config = ppo_config(tmp_path / "run", "placement.critic.cpus=99")
    began = time.monotonic()
    with pytest.raises(PreflightError) as caught:
        train(config)
    assert time.monotonic() - began < config.placement.placement_timeout_s
    assert "placement.critic: bundle 0 of 1 (99 CPU) has no node: " in str(caught.value)
    assert "has 4 CPU" in str(caught.value), "what the cluster has"


def test_what_others_hold_is_waited_for() -> None:
    first = reserve([Request("policy", 1, {"CPU": 3.0})], timeout_s=20)
    with pytest.raises(PlacementError, match="has 1 of 4 CPU free"):
        reserve([Request("critic", 1, {"CPU": 2.0})], timeout_s=1)
    first.release()
    second = reserve([Request("critic", 1, {"CPU": 2.0})], timeout_s=20)
    second.release()


def test_a_job_that_was_not_placed_holds_nothing() -> None:
    with pytest.raises(PlacementError):
        reserve([Request("policy", 1, {"CPU": 2.0}), Request("critic", 3, {"CPU": 1.0})], timeout_s=1)
    reserve([Request("policy", 1, {"CPU": ray.cluster_resources()["CPU"]})], timeout_s=20).release()


def test_two_jobs_may_reserve_places_for_the_same_role() -> None:
    for held in [reserve([Request("policy", 1, {"CPU": 1.0})], timeout_s=20) for _ in range(2)]:
        held.release()
