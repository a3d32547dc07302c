"""Who works and who has left in each stage of a step."""

from collections.abc import Callable
from typing import Any

from rlhf_ray.config.roles import Level
from rlhf_ray.planner.residence import stages

MakeJob = Callable[..., Any]

TOGETHER = (
    "placement.critic={colocate: policy}",
    "placement.reward={colocate: policy}",
    "placement.offload_idle=true",
)


def test_roles_that_stay_have_no_level(make_job: MakeJob) -> None:
    found = stages(make_job("ppo"))
    assert [stage.name for stage in found] == ["load", "generate", "score", "update", "sync"]
    assert all(not stage.levels for stage in found)
    assert found[3].working == {"policy", "critic"}


def test_each_stage_has_whom_it_needs_as_far_as_it_needs_them(make_job: MakeJob) -> None:
    by_name = {stage.name: stage for stage in stages(make_job("ppo", *TOGETHER))}
    assert list(by_name) == ["load", "generate", "score", "update critic", "update policy", "sync"]
    score = by_name["score"].levels
    assert score == dict.fromkeys(("policy", "critic", "reference", "reward"), Level.WEIGHTS)
    assert by_name["update critic"].levels["critic"] == Level.FULL
    assert by_name["update critic"].levels["policy"] == Level.OUT
    assert by_name["update policy"].levels["policy"] == Level.FULL
    assert by_name["update policy"].levels["critic"] == Level.OUT


def test_a_reference_on_the_policys_devices_leaves_before_the_update(make_job: MakeJob) -> None:
    found = stages(make_job("preference", "placement.offload_idle=true"))
    assert [(stage.name, stage.levels.get("reference")) for stage in found] == [
        ("load", None),
        ("score", Level.WEIGHTS),
        ("update", Level.OUT),
    ]


def test_a_job_with_one_role_only_updates(make_job: MakeJob) -> None:
    assert [stage.name for stage in stages(make_job("sft"))] == ["load", "update"]
