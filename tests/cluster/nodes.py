"""Run in a process of its own by tests: a job on a cluster of several nodes, and where its actors ran.

usage: nodes.py raylets|ADDRESS MODEL REWARD_MODEL PROMPTS RUN_DIR

`raylets` starts four nodes in this process; an address joins a cluster that is there. Policy, critic and what sits
with them go to nodes labelled `pool=train`, the rollout engine to those with `pool=rollout`. The last line is JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.cluster.assignment import PlacementError, Request
from rlhf_ray.cluster.placement import reserve
from rlhf_ray.config.loading import load_config
from rlhf_ray.controllers.train import train

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def main(where: str, model: str, reward: str, prompts: str, run_dir: str) -> None:
    found: dict[str, Any] = {}
    if where == "raylets":
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        for pool, extra in (("train", {}), ("train", {"fast_disk": 1}), ("rollout", {}), ("rollout", {})):
            cluster.add_node(num_cpus=2, labels={"pool": pool}, resources=extra, object_store_memory=80 * 2**20)
        ray.init(address=cluster.address, log_to_driver=False)
        found |= placements()
    else:
        ray.init(address=where, log_to_driver=False)
    split = [
        "placement.rollout.tensor_parallel=2",
        "placement.rollout.nodes_per_engine=2",
        "placement.rollout.strategy=SPREAD",
    ]
    config = load_config(
        TINY,
        [
            *(split if where == "raylets" else []),
            f"policy.model={model}",
            f"reward.0.model={reward}",
            f"data.prompts={prompts}",
            f"run.dir={run_dir}",
            "run.steps=1",
            "run.tensorboard=false",
            "placement.policy.labels={pool: train}",
            "placement.critic.labels={pool: train}",
            "placement.rollout.labels={pool: rollout}",
        ],
    )
    train(config)
    pools = {node["NodeID"]: node["Labels"].get("pool") for node in ray.nodes()}
    actors = [(actor["ActorClassName"], actor["Address"]["NodeID"]) for actor in ray._private.state.actors().values()]
    found["pools"] = {name: pools[node] for name, node in actors}
    found["engine_nodes"] = sorted({node for name, node in actors if name == "RolloutWorker"})
    found["rows"] = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    ray.shutdown()
    print(json.dumps(found))


def placements() -> dict[str, Any]:
    """What is reserved on the raylets for several requests: numbers of nodes, where tasks ran, errors."""
    spread = reserve([Request("policy", 4, {"CPU": 1.0}, nodes=2, labels={"pool": "train"})], timeout_s=20)
    ran = ray.get(
        [
            where.options(scheduling_strategy=PlacementGroupSchedulingStrategy(bundle.group, bundle.index)).remote()
            for bundle in spread.of("policy")
        ],
        timeout=60,
    )
    chosen = [bundle.node.node_id for bundle in spread.of("policy")]
    spread.release()
    disk = reserve([Request("critic", 1, {"CPU": 1.0, "fast_disk": 1.0})], timeout_s=20)
    has_disk = disk.of("critic")[0].node.resources.get("fast_disk")
    disk.release()
    try:
        reserve([Request("rollout", 1, {"CPU": 1.0}, labels={"pool": "gpu"})], timeout_s=60)
        error = None
    except PlacementError as refused:
        error = str(refused)
    return {"ran": ran, "chosen": chosen, "has_disk": has_disk, "error": error}


@ray.remote(num_cpus=1)
def where() -> str:
    return str(ray.get_runtime_context().get_node_id())


if __name__ == "__main__":
    main(*sys.argv[1:])
