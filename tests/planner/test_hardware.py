"""Cluster files, the ones that come along, and what Ray reports, as machines."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.loading import ConfigError
from rlhf_ray.planner.devices import DEVICES, GB, GIB
from rlhf_ray.planner.hardware import Hardware, PlanError, load_hardware, of_ray, ready_clusters, this_machine

MIXED = """
name: lab
devices:
  Tiny: {memory_gib: 8, bfloat16_tflops: 10, float32_tflops: 5, memory_gb_s: 200, link_gb_s: 10}
nodes:
  - {count: 2, device: H100, devices: 4, cpus: 32, host_memory_gib: 512, labels: {zone: a}, resources: {license: 1}}
  - {device: Tiny, devices: 1, cpus: 8, host_memory_gib: 32, network_gb_s: 1.25}
  - {cpus: 16, host_memory_gib: 64, object_store_gib: 10}
"""


def load(tmp_path: Path, text: str, times: int = 1) -> Hardware:
    path = tmp_path / "lab.yaml"
    path.write_text(text)
    return load_hardware(str(path), times)


def test_groups_become_nodes_with_what_ray_would_count(tmp_path: Path) -> None:
    hardware = load(tmp_path, MIXED)
    first, second, tiny, plain = hardware.machines
    assert hardware.name == "lab"
    assert first.node.resources == {"CPU": 32, "GPU": 4, "license": 1, "accelerator_type:H100": 1}
    assert first.node.labels == {"zone": "a"}
    assert (first.node.name, second.node.name, plain.node.name) == ("node-0", "node-1", "node-3")
    assert first.kind is DEVICES["H100"]
    assert first.device_memory == int(79.1 * GIB)
    assert first.object_store == int(0.3 * 512 * GIB)
    assert (tiny.device_memory, tiny.network) == (8 * GIB, 1.25 * GB)
    assert (plain.devices, plain.device_memory, plain.object_store) == (0, 64 * GIB, 10 * GIB)
    assert hardware.machine(tiny.node) is tiny


def test_a_cluster_can_have_each_node_several_times(tmp_path: Path) -> None:
    hardware = load(tmp_path, MIXED, times=3)
    assert [machine.devices for machine in hardware.machines] == [4] * 6 + [1] * 3 + [0] * 3
    assert len({node.node_id for node in hardware.nodes}) == 12
    assert hardware.name == "3 × lab"


@pytest.mark.parametrize("name", ready_clusters())
def test_ready_files_are_valid(name: str) -> None:
    machine = load_hardware(name).machines[0]
    devices, _, kind = name.partition("x")
    if not name.startswith("cpu"):
        assert machine.devices == int(devices)
        assert DEVICES[kind.upper()] is machine.kind


def test_a_ready_file_is_found_however_its_name_is_written() -> None:
    assert load_hardware("8×H100").machines == load_hardware("8xh100").machines


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nodes:\n  - {cpus: 8, host_memory_gib: 32, gpus: 8}", "nodes.0.gpus: unknown key; did you mean 'cpus'?"),
        ("nodes:\n  - {cpus: 8}", "nodes.0.host_memory_gib: is required"),
        ("nodes: []", "nodes is empty: a cluster has at least one"),
        (
            "nodes:\n  - {cpus: 8, host_memory_gib: 32, devices: 8}",
            "nodes.0.devices is 8, but nodes.0.device is not set: name their kind, such as H100",
        ),
        (
            "nodes:\n  - {cpus: 8, host_memory_gib: 32, device: H100}",
            "nodes.0.device is 'H100', but nodes.0.devices is 0: say how many a node has",
        ),
        (
            "nodes:\n  - {cpus: 8, host_memory_gib: 32, device: H10, devices: 1}",
            "nodes.0.device: 'H10' is not known; did you mean 'H100'?",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert caught.value.problems == [problem]


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(PlanError) as caught:
        load_hardware("8xh1000")
    assert str(caught.value) == "--cluster 8xh1000: there is no such file or name; did you mean '8xh100'?"


def ray_row(**resources: float) -> dict[str, Any]:
    return {
        "Alive": True,
        "NodeID": "a1",
        "NodeManagerAddress": "10.0.0.1",
        "Labels": {"zone": "a"},
        "Resources": {"CPU": 8.0, "memory": 70.0 * GIB, "object_store_memory": 30.0 * GIB, **resources},
    }


def test_ray_reports_devices_memory_and_what_is_free() -> None:
    row = ray_row(**{"GPU": 2.0, "accelerator_type:L4": 1.0})
    [machine] = of_ray([row, {**row, "Alive": False}], {"a1": {"GPU": 1.0}}, "live").machines
    assert (machine.kind, machine.devices) == (DEVICES["L4"], 2)
    assert (machine.host_memory, machine.object_store) == (100 * GIB, 30 * GIB)
    assert machine.node.free == {"GPU": 1.0}
    assert machine.node.labels == {"zone": "a"}


def test_a_node_without_devices_computes_in_host_memory() -> None:
    [machine] = of_ray([ray_row()], {}, "live").machines
    assert machine.kind.is_cpu
    assert machine.device_memory == 100 * GIB


def test_devices_of_an_unknown_kind_need_a_file() -> None:
    with pytest.raises(PlanError) as caught:
        of_ray([ray_row(**{"GPU": 1.0, "accelerator_type:V100": 1.0})], {}, "live")
    assert str(caught.value).startswith(
        "node 10.0.0.1: its GPUs are of kind 'V100', which the planner does not know (known: H100, H200,"
    )
    with pytest.raises(PlanError, match="Ray does not say of what kind"):
        of_ray([ray_row(GPU=1.0)], {}, "live")


def test_this_machine_offers_what_a_local_cluster_would() -> None:
    [machine] = this_machine(cpus=3).machines
    assert machine.cpus == 3
    assert machine.host_memory > 2**30
