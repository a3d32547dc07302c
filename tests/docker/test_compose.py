"""docker/compose.yaml: two nodes of one cluster, with a token, and nothing open to other machines."""

import re
import warnings
from typing import Any

import pytest
import yaml
from compose_spec import PyOptions
from docker_files import DOCKER, REPOSITORY, options

TEXT = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
FILE: dict[str, Any] = yaml.safe_load(TEXT)
HEAD, WORKER = FILE["services"]["head"], FILE["services"]["worker"]


def test_both_nodes_have_image_token_and_storage_in_common() -> None:
    assert set(FILE["services"]) == {"head", "worker"}
    for key in ("image", "environment", "secrets", "volumes"):
        assert HEAD[key] == WORKER[key]
    assert HEAD["environment"] == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/run/secrets/ray_token"}
    assert HEAD["secrets"] == ["ray_token"]
    assert "shared:/shared" in HEAD["volumes"]


def test_secrets_and_volumes_that_are_used_are_declared() -> None:
    build = HEAD["build"]
    assert set(FILE["secrets"]) == {*HEAD["secrets"], *build["secrets"]}
    assert "shared" in FILE["volumes"]
    assert (DOCKER / build["context"]).resolve() == REPOSITORY
    assert (REPOSITORY / build["dockerfile"]).exists()
    assert (DOCKER / "../configs").is_dir()
    # The files that hold secrets are nobody's to commit.
    ignored = (REPOSITORY / ".gitignore").read_text().splitlines()
    for secret in FILE["secrets"].values():
        default = re.fullmatch(r"\$\{\w+:-\./(\w[\w.]*)\}", secret["file"])
        assert default is not None
        assert f"/docker/{default[1]}" in ignored


@pytest.mark.parametrize("service", ["head", "worker"])
def test_ray_knows_the_options_that_nodes_start_with(service: str) -> None:
    command = FILE["services"][service]["command"]
    assert command[:2] == ["ray", "start"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, about pydantic
        from ray.scripts.scripts import start
    known = {option for parameter in start.params for option in parameter.opts}
    assert options(command) <= known
    assert "--block" in command


def test_worker_joins_the_head_once_it_is_healthy() -> None:
    (port,) = (word for word in HEAD["command"] if word.startswith("--port="))
    assert f"--address=head:{port.removeprefix('--port=')}" in WORKER["command"]
    assert WORKER["depends_on"] == {"head": {"condition": "service_healthy"}}
    assert "healthcheck" in HEAD
    assert "healthcheck" in WORKER


def test_only_this_machine_reaches_the_dashboard() -> None:
    assert HEAD["ports"] == ["127.0.0.1:8265:8265"]
    assert "ports" not in WORKER
    assert "network_mode" not in TEXT
    assert "privileged" not in TEXT


def test_file_follows_the_compose_specification() -> None:
    merge = PyOptions(apply_merge=True)
    merge.from_yaml(TEXT).validate()
    with pytest.raises(ValueError, match="stop_grace_perod"):
        merge.from_yaml(TEXT.replace("stop_grace_period", "stop_grace_perod"))
