"""The configs for large models fit on the groups of docker/kuberay/raycluster.yaml."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from docker_files import DOCKER, REPOSITORY, resources
from typer.testing import CliRunner

from rlhf_ray.cli.app import main
from rlhf_ray.config.loading import load_config
from rlhf_ray.models.config_json import PUBLIC_MODELS

(CLUSTER,) = resources(DOCKER / "kuberay" / "raycluster.yaml")
POOLS = {group["labels"]["pool"]: group for group in CLUSTER["spec"]["workerGroupSpecs"]}


of_each = pytest.mark.parametrize("config", sorted(REPOSITORY.glob("configs/llama*.yaml")), ids=lambda path: path.name)


@of_each
def test_pools_hold_what_the_roles_reserve(config: Path) -> None:
    needed: dict[str, Counter[str]] = {pool: Counter() for pool in POOLS}
    for placement in load_config(config).placements.values():
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


@of_each
def test_planner_says_that_they_fit_on_h100s(config: Path, tmp_path: Path) -> None:
    reward = tmp_path / "reward"
    reward.mkdir()
    (reward / "config.json").write_text(json.dumps(dict(PUBLIC_MODELS["meta-llama/Meta-Llama-3-8B"])))
    nodes = [
        {
            "device": "H100",
            "devices": int(limits["nvidia.com/gpu"]),
            "cpus": int(limits["cpu"]),
            "host_memory_gib": int(limits["memory"].removesuffix("Gi")),
            "labels": {"pool": pool},
            "count": group["maxReplicas"],
        }
        for pool, group in POOLS.items()
        for limits in [group["template"]["spec"]["containers"][0]["resources"]["limits"]]
    ]
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"nodes": nodes}))
    policy = f"meta-llama/{Path(load_config(config).policy.model).name}"
    overrides = [f"policy.model={policy}", f"reward.0.model={reward}"]
    done = CliRunner().invoke(main, ["plan", str(config), "--cluster", str(tmp_path / "cluster.yaml"), *overrides])
    assert done.exit_code == 0, done.output
