"""Jobs on several nodes: raylets on this machine, and network namespaces with addresses of their own."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.data.prepare import prepare

pytestmark = pytest.mark.integration
SCRIPT = Path(__file__).parent / "nodes.py"
LIMIT_S = 240


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, as_reward_model: Callable[[Path], Path]) -> list[str]:
    """Model, reward model and prompts."""
    target = tmp_path_factory.mktemp("nodes")
    prepare(target, only={"tiny"})
    model = target / "models/tiny"
    return [str(model), str(as_reward_model(model)), str(target / "data/tiny_prompts.jsonl")]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "RAY_IGNORE_UNHANDLED_ERRORS": "1", "RAY_AUTH_MODE": "disabled"}


def job(where: str, inputs: list[str], run_dir: Path) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), where, *inputs, str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_roles_in_their_pools(found: dict[str, Any]) -> None:
    trained = {"PolicyWorker": "train", "CriticWorker": "train", "ReferenceWorker": "train"}
    assert found["pools"].items() >= {**trained, "RolloutWorker": "rollout"}.items()
    [row] = found["rows"]
    assert row["mismatch/logprob_abs_mean"] < 1e-4
    assert row["time/weight_sync_s"] > 0


def test_roles_sit_on_the_raylets_that_their_labels_name(inputs: list[str], tmp_path: Path) -> None:
    found = job("raylets", inputs, tmp_path / "run")
    assert found["ran"] == found["chosen"], "actors run where they were placed"
    first, second = found["chosen"][:2], found["chosen"][2:]
    assert first[0] == first[1] != second[0] == second[1], "ranks on one node follow each other"
    assert found["has_disk"] == 1
    assert found["error"].startswith("placement.rollout: bundle 0 of 1 (1 CPU, pool=gpu) has no node: ")
    assert found["error"].count("has train as pool") == found["error"].count("has rollout as pool") == 2
    assert len(found["engine_nodes"]) == 2, "one engine's two workers are on two nodes"
    assert_roles_in_their_pools(found)


HEAD, OTHER = "10.77.0.1", "10.77.0.2"
NAMESPACE = "rlhf-ray-test"
can_make_namespaces = os.geteuid() == 0 and shutil.which("ip") is not None


def sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


@contextmanager
def two_hosts() -> Iterator[None]:
    """A network namespace that is linked with this machine, each side with its own address."""
    sh("ip", "netns", "add", NAMESPACE)
    try:
        sh("ip", "link", "add", "rlhf-a", "type", "veth", "peer", "name", "rlhf-b", "netns", NAMESPACE)
        sh("ip", "addr", "add", f"{HEAD}/24", "dev", "rlhf-a")
        sh("ip", "link", "set", "rlhf-a", "up")
        for command in (f"addr add {OTHER}/24 dev rlhf-b", "link set rlhf-b up", "link set lo up"):
            sh("ip", "-n", NAMESPACE, *command.split())
        yield
    finally:
        sh("ip", "netns", "del", NAMESPACE)  # and with it the link


@contextmanager
def ray_node(*options: str, inside: str | None = None) -> Iterator[None]:
    """A Ray node, which ends with the block; `inside` is the namespace that it lives in."""
    enter = ["ip", "netns", "exec", inside] if inside else []
    command = [*enter, str(Path(sys.executable).with_name("ray")), "start", "--block", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail("".join(said))
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


def free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.mark.skipif(not can_make_namespaces, reason="needs root and iproute2")
def test_weights_travel_between_hosts_with_addresses_of_their_own(inputs: list[str], tmp_path: Path) -> None:
    port = free_port()
    common = ["--num-cpus=2", f"--object-store-memory={80 * 2**20}"]
    head = ["--head", f"--port={port}", f"--node-ip-address={HEAD}", "--include-dashboard=false", "--labels=pool=train"]
    other = [f"--address={HEAD}:{port}", f"--node-ip-address={OTHER}", "--labels=pool=rollout"]
    with two_hosts(), ray_node(*head, *common), ray_node(*other, *common[:2], inside=NAMESPACE):
        found = job(f"{HEAD}:{port}", inputs, tmp_path / "run")
    assert_roles_in_their_pools(found)
