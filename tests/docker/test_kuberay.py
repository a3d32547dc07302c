"""The manifests for KubeRay: they fit its schemas, to the letter, and what the schemas don't say."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crd_schemas import validator_of
from docker_files import DOCKER, DOCKERFILES, MANIFESTS, REPOSITORY, clusters, groups, instructions, locked, resources
from jsonschema import Draft202012Validator

from rlhf_ray.config.loading import load_config

SCHEMAS = REPOSITORY.parent / "shared" / "kuberay"
Resource = dict[str, Any]

OURS = [
    pytest.param(resource, id=f"{manifest.stem}-{resource['kind']}")
    for manifest in MANIFESTS
    for resource in resources(manifest)
    if resource["apiVersion"] == "ray.io/v1"
]
of_each_cluster = pytest.mark.parametrize("cluster", [pytest.param(spec, id=name) for name, spec in clusters()])


@pytest.fixture(scope="module")
def validator() -> Callable[[Resource], Draft202012Validator]:
    """The schema of a resource's kind."""
    made: dict[str, Draft202012Validator] = {}

    def get(resource: Resource) -> Draft202012Validator:
        kind = resource["kind"]
        if kind not in made:
            file = SCHEMAS / f"ray.io_{kind.lower()}s.yaml"
            if not file.exists():
                pytest.skip(
                    f"KubeRay's schema {file.name} is not there: it comes with the project, beside the checkout"
                )
            made[kind] = validator_of(file, "v1")
        return made[kind]

    return get


@pytest.mark.parametrize("resource", OURS)
def test_manifest_fits_the_schema(resource: Resource, validator: Callable[[Resource], Draft202012Validator]) -> None:
    assert [f"{error.json_path}: {error.message}" for error in validator(resource).iter_errors(resource)] == []


@pytest.mark.parametrize("resource", OURS)
def test_a_misspelt_key_anywhere_is_an_error(
    resource: Resource, validator: Callable[[Resource], Draft202012Validator]
) -> None:
    check = validator(resource)
    keys = [path for path in _keys(resource) if not _may_have_any_name(path)]
    assert len(keys) > 40
    for path in keys:
        broken = copy.deepcopy(resource)
        parent = broken
        for step in path[:-1]:
            parent = parent[step]
        parent[f"{path[-1]}x"] = parent.pop(path[-1])
        assert not check.is_valid(broken), f"{'.'.join(map(str, path))}x passes"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.workerGroupSpecs.0.replicas", "one"),
        ("spec.workerGroupSpecs.0.maxReplicas", None),
        ("spec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.memory", "900 GB"),
        ("spec.authOptions.mode", "tokn"),
        ("spec.autoscalerOptions.version", "v3"),
        ("spec.headGroupSpec.template", None),
        ("spec.headGroupSpec.resources.CPU", 0),
    ],
)
def test_a_wrong_value_is_an_error(
    path: str, value: object, validator: Callable[[Resource], Draft202012Validator]
) -> None:
    (resource,) = resources(DOCKER / "kuberay" / "raycluster.yaml")
    *parents, last = path.split(".")
    parent: Any = resource
    for step in parents:
        parent = parent[int(step) if step.isdigit() else step]
    if value is None:
        del parent[last]
    else:
        parent[last] = value
    assert not validator(resource).is_valid(resource)


def _keys(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of all keys within."""
    if isinstance(value, list):
        return [found for number, item in enumerate(value) for found in _keys(item, (*path, number))]
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in ((*path, key), *_keys(item, (*path, key)))]
    return []


def _may_have_any_name(path: tuple[str | int, ...]) -> bool:
    """Labels, node selectors and resources are maps whose keys mean something to others."""
    return path[-2:-1] in [("labels",), ("nodeSelector",), ("limits",), ("requests",)] or (
        path[-2:-1] == ("resources",) and path[-1] not in ("limits", "requests")
    )


def test_job_brings_the_cluster_of_the_other_manifest() -> None:
    (cluster,), (job,) = (resources(DOCKER / "kuberay" / name) for name in ("raycluster.yaml", "rayjob.yaml"))
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


@of_each_cluster
def test_cluster_has_the_locked_ray_and_a_token(cluster: Resource) -> None:
    assert cluster["rayVersion"] == locked("ray")
    assert cluster["authOptions"] == {"mode": "token", "secretName": "rlhf-ray-token"}


def test_no_manifest_holds_a_secret() -> None:
    assert not [resource for manifest in MANIFESTS for resource in resources(manifest) if resource["kind"] == "Secret"]


@of_each_cluster
def test_dashboard_is_not_exposed(cluster: Resource) -> None:
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "enableIngress" not in cluster["headGroupSpec"]
    for group in groups(cluster):
        assert "hostNetwork" not in group["template"]["spec"]
        for container in group["template"]["spec"]["containers"]:
            assert not [port for port in container.get("ports", []) if "hostPort" in port]


@of_each_cluster
def test_pods_run_as_the_user_of_the_image_without_privileges(cluster: Resource) -> None:
    uids = {
        int(rest.partition("=")[2])
        for dockerfile in DOCKERFILES
        for keyword, rest in instructions(dockerfile)
        if keyword == "ARG" and rest.startswith("UID=")
    }
    images = {f"rlhf-ray:{dockerfile.name.removesuffix('.Dockerfile')}" for dockerfile in DOCKERFILES}
    for group in groups(cluster):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert {pod["securityContext"]["runAsUser"]} == uids
        (container,) = pod["containers"]
        assert container["image"] in images
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_volumes_that_are_mounted_are_claimed(manifest: Path) -> None:
    known = {
        resource["metadata"]["name"]
        for file in (manifest, DOCKER / "kuberay" / "shared.yaml")
        for resource in resources(file)
        if resource["kind"] == "PersistentVolumeClaim"
    }
    for name, cluster in clusters():
        if name != manifest.name:
            continue
        for group in groups(cluster):
            pod = group["template"]["spec"]
            claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
            assert set(claims.values()) <= known
            for container in pod["containers"]:
                assert [(mount["name"], mount["mountPath"]) for mount in container["volumeMounts"]] == [
                    ("shared", "/shared")
                ]
                assert "shared" in claims


def test_the_volume_of_several_machines_can_be_written_by_all() -> None:
    (claim,) = (r for r in resources(DOCKER / "kuberay" / "shared.yaml") if r["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@of_each_cluster
def test_groups_scale_within_limits(cluster: Resource) -> None:
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] < 100


@of_each_cluster
def test_groups_keep_the_operators_own_rules(cluster: Resource) -> None:
    """What KubeRay refuses though its schema allows it (validation.go of its operator)."""
    for group in groups(cluster):
        start = group["rayStartParams"]
        assert "labels" not in start, "KubeRay wants them in the group's own labels"
        assert not (group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(start))
        if cluster.get("enableInTreeAutoscaling"):
            assert group["template"]["spec"].get("restartPolicy", "Never") == "Never", "for the autoscaler, version 2"


@of_each_cluster
def test_groups_have_labels_that_placement_can_ask_for(cluster: Resource) -> None:
    labels = {group["groupName"]: group["labels"] for group in cluster["workerGroupSpecs"]}
    for name, own in labels.items():
        assert own == {"pool": name}
    if cluster.get("enableInTreeAutoscaling"):
        assert cluster["autoscalerOptions"]["version"] == "v2", "the first version knows no labels"


@pytest.mark.parametrize("resource", [entry for entry in OURS if "RayJob" in str(entry.id)])
def test_entrypoints_are_commands_that_the_configs_take(resource: Resource) -> None:
    commands = re.findall(r"rlhf-ray train ([\w./-]+)((?: [\w.]+=[\w.]+)*)", resource["spec"]["entrypoint"])
    assert commands
    for config, overrides in commands:
        if config.startswith("/opt/rlhf_ray/"):
            config = REPOSITORY / config.removeprefix("/opt/rlhf_ray/")
        else:  # the user's own
            config = REPOSITORY / "configs" / "tiny.yaml"
        load_config(config, overrides.split())
