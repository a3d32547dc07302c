"""Nodes of several kinds: whose CPUs decide about the number format of a job."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.cluster.processors import Processor, look_at
from rlhf_ray.cluster.topology import Node
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import parse_config
from rlhf_ray.config.number_formats import choose

OLD = Processor("flags\t: avx avx2 fma", {})
NEW = Processor("flags\t: avx avx2 fma avx512f avx512_bf16", {})
HELD = Processor(NEW.cpuinfo, {"ONEDNN_MAX_CPU_ISA": "AVX2"})


def node(name: str, cpus: float = 4.0, **labels: str) -> Node:
    return Node(name, {"CPU": cpus}, {"CPU": cpus}, labels, name)


def ppo(**placement: Any) -> Job:
    return parse_config(
        {
            "job": "ppo",
            "name": "a",
            "policy": {"model": "p"},
            "reward": [{"model": "r"}],
            "data": {"prompts": "rows.jsonl", "prompts_per_step": 4},
            "placement": placement,
            "run": {"dir": "runs/a", "steps": 5},
        }
    )


def chosen(config: Job, nodes: list[Node], processors: dict[str, Processor]) -> tuple[set[str], str]:
    found = choose(config, look_at(config, nodes, processors))
    assert {one.key for one in found.chosen} == {
        "policy.engine",
        "critic.engine",
        "reference.engine",
        "reward.0.engine",
        "rollout.engine",
    }
    [line] = found.lines
    return {one.dtype for one in found.chosen}, line


@pytest.mark.parametrize(
    ("other", "dtype", "why"),
    [
        (NEW, "bfloat16", "the CPU of node a has AVX512_BF16 (all 2 nodes multiply in bfloat16)"),
        (
            OLD,
            "float32",
            "the CPU of node b has neither AVX512_BF16 nor AMX (1 of 2 nodes do not multiply in bfloat16)",
        ),
        (
            HELD,
            "float32",
            "the CPU of node b is held to AVX2 by ONEDNN_MAX_CPU_ISA (1 of 2 nodes do not multiply in bfloat16)",
        ),
    ],
)
def test_every_node_that_can_take_a_role_counts(other: Processor, dtype: str, why: str) -> None:
    found, line = chosen(ppo(), [node("a"), node("b")], {"a": NEW, "b": other})
    assert found == {dtype}
    assert line.endswith(why)


def test_nodes_that_no_role_can_come_to_do_not_count() -> None:
    train = {"labels": {"pool": "train"}}
    config = ppo(policy=train, critic=train, rollout=train)
    nodes = [node("head", cpus=0.0), node("a", pool="train"), node("b", pool="other")]
    found, line = chosen(config, nodes, {"head": OLD, "a": NEW, "b": OLD})
    assert found == {"bfloat16"}
    assert line.endswith("the CPU of node a has AVX512_BF16")


def test_an_old_node_of_the_engines_alone_decides_for_the_policy_too() -> None:
    config = ppo(
        rollout={"labels": {"pool": "old"}}, policy={"labels": {"pool": "new"}}, critic={"labels": {"pool": "new"}}
    )
    found, _ = chosen(config, [node("a", pool="new"), node("b", pool="old")], {"a": NEW, "b": OLD})
    assert found == {"float32"}


def test_a_role_whose_variables_hold_its_cpu_back_counts() -> None:
    config = ppo(critic={"env": {"ONEDNN_MAX_CPU_ISA": "AVX2"}})
    found, line = chosen(config, [node("a")], {"a": NEW})
    assert found == {"float32"}
    assert line.endswith("the CPU of this machine is held to AVX2 by ONEDNN_MAX_CPU_ISA")


def test_a_node_that_does_not_answer_is_not_trusted() -> None:
    found, line = chosen(ppo(), [node("a"), node("b")], {"a": NEW})
    assert found == {"float32"}
    assert "the CPU of node b is not known, since its node did not answer" in line


def test_a_cluster_without_a_node_for_any_role_yet() -> None:
    found, line = chosen(ppo(), [node("head", cpus=0.0)], {"head": NEW})
    assert found == {"float32"}
    assert line.endswith("no node that is there now can take a role on CPUs")


@pytest.mark.integration
def test_nodes_are_asked_and_the_driver_does_not_count() -> None:
    """Two raylets, one of which was started with the variable, in a driver that is not held back."""
    script = Path(__file__).parent / "mixed_nodes.py"
    auto = [f"{key}.engine.dtype=auto" for key in ("policy", "critic", "reference", "reward.0")]
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_MAX_CPU_ISA")}
    done = subprocess.run(
        [sys.executable, script, Path(__file__).parents[2] / "configs" / "tiny.yaml", *auto],
        capture_output=True,
        text=True,
        timeout=180,
        env={**environ, "RAY_AUTH_MODE": "disabled"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    [both], [old] = found["both"], found["old"]
    assert both.startswith(
        "float32 for policy.engine, critic.engine, reference.engine, reward.0.engine, rollout.engine"
    )
    assert "of 2 nodes do not multiply in bfloat16" in both
    assert old.endswith("is held to AVX2 by ONEDNN_MAX_CPU_ISA")
