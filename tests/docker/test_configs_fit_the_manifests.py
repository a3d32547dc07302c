"""The configs for large models fit on the groups of docker/kuberay/raycluster.yaml at their largest."""

from collections import Counter
from pathlib import Path

import pytest
from docker_files import DOCKER, REPOSITORY, resources

from rlhf_ray.config.loading import load_config

(CLUSTER,) = resources(DOCKER / "kuberay" / "raycluster.yaml")
POOLS = {group["labels"]["pool"]: group for group in CLUSTER["spec"]["workerGroupSpecs"]}


@pytest.mark.parametrize("config", sorted(REPOSITORY.glob("configs/llama*.yaml")), ids=lambda path: path.name)
def test_pools_hold_what_the_roles_reserve(config: Path) -> None:
    needed: dict[str, Counter[str]] = {pool: Counter() for pool in POOLS}
    for placement, _ in load_config(config).places.values():
        if placement.colocate is not None:
            continue
        assert set(placement.labels) <= {"pool"}
        pool = placement.labels.get("pool", "train")
        workers = getattr(placement, "workers", None) or placement.ranks
        needed[pool].update({"cpu": workers * placement.cpus, "nvidia.com/gpu": workers * placement.gpus})
    gpus = sum(counts["nvidia.com/gpu"] for counts in needed.values())
    assert f"_{gpus:g}gpu" in config.name
    for pool, counts in needed.items():
        (container,) = POOLS[pool]["template"]["spec"]["containers"]
        limits, nodes = container["resources"]["limits"], POOLS[pool]["maxReplicas"]
        for resource, amount in counts.items():
            assert amount <= nodes * int(limits[resource]), f"{pool}: {resource}"
