"""The planner's view of a running cluster."""

import ray

from rlhf_ray.planner.hardware import live_hardware


def test_a_running_cluster_is_planned_with_what_ray_reports() -> None:
    with live_hardware("auto") as hardware:
        [machine] = hardware.machines
    assert machine.cpus == 4
    assert machine.devices == 0
    assert machine.object_store == 200 * 2**20
    assert machine.host_memory > machine.object_store
    assert machine.node.node_id == ray.get_runtime_context().get_node_id()
