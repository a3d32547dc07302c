"""Run in a process of its own by tests: the number format that is chosen on a cluster of two nodes, of which one
has a CPU that is held back by the environment in which Ray was started there.

usage: mixed_nodes.py CONFIG [KEY=VALUE ...]

The last line is JSON: what was chosen and why.
"""

import json
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from rlhf_ray.config.loading import load_config
from rlhf_ray.controllers.number_formats import choose_on_cluster


def main(config: str, *overrides: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.add_node(num_cpus=2, labels={"pool": "new"}, object_store_memory=80 * 2**20)
    held = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    cluster.add_node(num_cpus=2, labels={"pool": "old"}, object_store_memory=80 * 2**20, env_vars=held)
    ray.init(address=cluster.address, log_to_driver=False)
    found = choose_on_cluster(load_config(Path(config), overrides))
    only = [f"placement.{role}.labels={{pool: old}}" for role in ("policy", "critic", "rollout")]
    old = choose_on_cluster(load_config(Path(config), [*overrides, *only]))
    ray.shutdown()
    print(json.dumps({"both": found.lines, "old": old.lines}))


if __name__ == "__main__":
    main(*sys.argv[1:])
