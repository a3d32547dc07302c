"""Jobs on several nodes: raylets on this machine, and network namespaces with addresses of their own."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration
SCRIPT = Path(__file__).parent / "nodes.py"
LIMIT_S = 240


@pytest.fixture(scope="module")
def inputs(prepared: Path) -> list[str]:
    """Model, reward model and prompts."""
    return [str(prepared / path) for path in ("models/tiny", "models/tiny-reward", "data/tiny_prompts.jsonl")]


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


# Of this process: what a killed one left behind is in nobody's way.
NAMESPACE, LINK, PEER = (f"rlhf{os.getpid()}{end}" for end in ("", "a", "b"))
HEAD, OTHER = (f"10.{64 + os.getpid() // 256 % 128}.{os.getpid() % 256}.{host}" for host in (1, 2))


def sh(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


@pytest.fixture
def namespace() -> Iterator[None]:
    """A network namespace, where root may make one."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    made = subprocess.run(["ip", "netns", "add", NAMESPACE], capture_output=True, text=True, timeout=60, check=False)
    if made.returncode != 0:
        pytest.skip(f"this machine makes no network namespaces: {made.stderr.strip()}")
    yield
    sh("ip", "netns", "del", NAMESPACE)  # and with it the link


@pytest.fixture
def two_hosts(namespace: None) -> None:
    """The namespace is linked with this machine, each side with its own address."""
    sh("ip", "link", "add", LINK, "type", "veth", "peer", "name", PEER, "netns", NAMESPACE)
    sh("ip", "addr", "add", f"{HEAD}/24", "dev", LINK)
    sh("ip", "link", "set", LINK, "up")
    for command in (f"addr add {OTHER}/24 dev {PEER}", f"link set {PEER} up", "link set lo up"):
        sh("ip", "-n", NAMESPACE, *command.split())


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


@pytest.mark.usefixtures("two_hosts")
def test_weights_travel_between_hosts_with_addresses_of_their_own(inputs: list[str], tmp_path: Path) -> None:
    port = free_port()
    common = ["--num-cpus=2", f"--object-store-memory={80 * 2**20}"]
    head = ["--head", f"--port={port}", f"--node-ip-address={HEAD}", "--include-dashboard=false", "--labels=pool=train"]
    other = [f"--address={HEAD}:{port}", f"--node-ip-address={OTHER}", "--labels=pool=rollout"]
    with ray_node(*head, *common), ray_node(*other, *common[:2], inside=NAMESPACE):
        found = job(f"{HEAD}:{port}", inputs, tmp_path / "run")
    assert_roles_in_their_pools(found)
