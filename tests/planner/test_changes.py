"""Proposals for jobs that do not fit: each is planned again here, and must fit."""

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_ray.planner.calibration import ProcessMemory
from rlhf_ray.planner.changes import nearest_changes
from rlhf_ray.planner.hardware import load_hardware
from rlhf_ray.planner.memory import plan_memory

MakeJob = Callable[..., Any]
LLAMA_70B = "meta-llama/Meta-Llama-3-70B"


def proposals(job: Any, cluster: str = "8xh100", nodes: int = 1) -> list[list[str]]:
    return [change.arguments for change in nearest_changes(job, load_hardware(cluster, nodes), ProcessMemory())]


@pytest.mark.parametrize(
    ("kind", "cluster", "nodes", "overrides"),
    [
        ("ppo", "8xh100", 1, ()),
        ("ppo", "8xa100-40g", 2, ("placement.policy.ranks=4", "placement.critic.ranks=4")),
        ("sft", "8xh100", 1, ("policy.engine.zero_stage=0",)),
        ("sft", "8xl4", 1, ()),
        ("sft", "8xh200", 2, (f"policy.model={LLAMA_70B}",)),
        ("reward_model", "8xa100-40g", 1, ()),
        ("preference", "8xa100-80g", 1, ()),
        (
            "sft",
            "cpu-16",
            1,
            ("placement.policy={cpus: 4}", "policy.engine.dtype=float32", "policy.model=Qwen/Qwen3-8B"),
        ),
    ],
)
def test_every_proposal_fits(
    make_job: MakeJob, kind: str, cluster: str, nodes: int, overrides: tuple[str, ...]
) -> None:
    hardware = load_hardware(cluster, nodes)
    found = proposals(make_job(kind, *overrides), cluster, nodes)
    if (kind, cluster) == ("sft", "cpu-16"):
        assert not found  # eight billion weights with their optimizer state are more than the node has
        return
    assert found
    for arguments in found:
        assert plan_memory(make_job(kind, *overrides, *arguments), hardware, ProcessMemory()).fits, arguments


def test_the_nearest_proposal_comes_first(make_job: MakeJob) -> None:
    found = nearest_changes(make_job("ppo"), load_hardware("8xh100"), ProcessMemory())
    assert [change.cost for change in found] == sorted(change.cost for change in found)


def test_one_smaller_micro_batch_is_nearer_than_another_way_to_train(make_job: MakeJob) -> None:
    job = make_job("sft", "policy.engine.micro_batch_tokens=16384")
    assert proposals(job)[0] == ["policy.engine.micro_batch_tokens=4096"]


def test_keys_that_are_so_already_are_not_proposed(make_job: MakeJob) -> None:
    job = make_job("sft", "policy.engine.zero_stage=3", "policy.engine.micro_batch_tokens=2048")
    for arguments in proposals(job, "8xl4"):
        assert "policy.engine.zero_stage=3" not in arguments


def test_roles_on_other_devices_are_left_as_they_are(make_job: MakeJob) -> None:
    job = make_job(
        "ppo", "critic.engine.micro_batch_tokens=2048", "critic.engine.zero_stage=3", "placement.critic.ranks=4"
    )
    for arguments in proposals(job, nodes=2):
        assert not any(argument.startswith(("critic.", "placement.critic.")) for argument in arguments)


def test_an_engine_that_is_too_large_gets_more_workers(make_job: MakeJob) -> None:
    job = make_job(
        "ppo",
        f"policy.model={LLAMA_70B}",
        "policy.engine={zero_stage: 3, micro_batch_tokens: 2048, activation_checkpointing: true}",
        "reference.engine.zero_stage=3",
        "placement.policy.ranks=16",
        "placement.rollout.engines=8",
    )
    assert "placement.rollout.tensor_parallel=2" in proposals(job, "8xh200", 8)[0]


def test_more_processes_than_devices_become_fewer(make_job: MakeJob) -> None:
    job = make_job("sft", "placement.policy.ranks=16", "policy.engine.zero_stage=3")
    assert "placement.policy.ranks=8" in proposals(job)[0]


def test_there_may_be_no_change_that_helps(make_job: MakeJob) -> None:
    job = make_job("sft", f"policy.model={LLAMA_70B}", "placement.policy.ranks=1")
    assert proposals(job, "1xl4") == []
