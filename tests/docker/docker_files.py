"""The files of docker/, read."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
MANIFESTS = sorted(DOCKER.glob("kuberay/*.yaml"))


class Instruction(NamedTuple):
    """`RUN make`: its keyword in capitals, and the rest with continued lines joined."""

    keyword: str
    rest: str


def instructions(dockerfile: Path) -> list[Instruction]:
    """Instructions in order, without comments."""
    lines = (line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#"))
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    split = (line.split(None, 1) for line in text.splitlines() if line.strip())
    return [Instruction(keyword.upper(), " ".join(rest.split())) for keyword, rest in split]


def options(command: list[str] | str) -> set[str]:
    """Names of the long options of a command line."""
    words = command.split() if isinstance(command, str) else command
    return {word.split("=", 1)[0] for word in words if word.startswith("--")}


def resources(manifest: Path) -> list[dict[str, Any]]:
    """The Kubernetes resources of a file."""
    return list(yaml.safe_load_all(manifest.read_text(encoding="utf-8")))


def clusters() -> list[tuple[str, dict[str, Any]]]:
    """File name and spec of each Ray cluster, a job's own included."""
    found = []
    for manifest in MANIFESTS:
        for resource in resources(manifest):
            if resource["apiVersion"] == "ray.io/v1":
                spec = resource["spec"]
                found.append((manifest.name, spec.get("rayClusterSpec", spec)))
    return found


def groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """Head group and worker groups of a cluster's spec."""
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def locked(package: str, profile: str = "cpu") -> str:
    """The version that a lock pins."""
    (version,) = re.findall(rf"(?m)^{re.escape(package)}==(\S+)", (REPOSITORY / f"locks/{profile}.txt").read_text())
    return str(version)
