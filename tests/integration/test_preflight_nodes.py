"""The checks before a start on real nodes: three raylets, through the command in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from rlhf_ray.cluster.assignment import PlacementError
from rlhf_ray.cluster.preflight.probe import NodeProbe
from rlhf_ray.cluster.preflight.probing import Deadline, probes
from rlhf_ray.cluster.preflight.report import PreflightError, Report
from rlhf_ray.cluster.preflight.run import preflight
from rlhf_ray.cluster.topology import Node, live_nodes
from rlhf_ray.config.jobs import SFTJob
from rlhf_ray.controllers import train as train_module
from rlhf_ray.controllers.inputs import EpochInputs

REPOSITORY = Path(__file__).parents[2]
GONE = "ab" * 28

PPO = """
job: ppo
name: three-nodes
policy: {{model: {tiny}/models/tiny}}
critic: {{init_from: {tiny}/models/tiny}}
reward: [{{function: "reward_functions:letters"}}]
rollout: {{sampling: {{max_new_tokens: 8}}, engine: {{max_model_len: 32}}}}
data: {{prompts: {tiny}/data/tiny_prompts.jsonl, prompts_per_step: 16}}
placement:
  policy: {{labels: {{zone: train}}}}
  critic: {{labels: {{zone: train}}}}
  rollout: {{labels: {{zone: sample}}, engines: 2, nodes: 2}}
run: {{steps: 1, dir: {run_dir}}}
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster of three nodes, which differ by a label."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "labels": {"zone": "train"}})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, labels={"zone": "sample"}, wait=False)
        cluster.wait_for_nodes(timeout=60)
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.fixture
def look(tiny: Path, tmp_path: Path, address: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`rlhf-ray preflight` on that cluster, with further overrides."""
    (tmp_path / "my.yaml").write_text(PPO.format(tiny=tiny, run_dir=tmp_path / "runs/a"))

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rlhf_ray.cli.app", "preflight", "my.yaml", *overrides, "--cluster", address]
        path = os.pathsep.join([str(REPOSITORY), os.environ["PYTHONPATH"]])
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def test_nodes_that_can_run_the_job_pass_and_keep_no_trace(
    look: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = look()
    assert done.returncode == 0, done.stdout + done.stderr
    *table, last = done.stdout.splitlines()
    assert last.startswith("3 nodes looked at in ")
    assert last.endswith(" GB/s over gloo")
    rows = {line.split()[0]: line.split()[1:] for line in table}
    assert rows["nodes"][:2] == ["ok", "3"]
    assert rows["ports"][:2] == ["ok", "6"], "each to both others"
    assert rows["links"][:2] == ["ok", "gloo:"]
    assert rows.pop("dtype")[0] == "auto"
    assert {status for status, *_ in rows.values()} == {"ok"}
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]


def test_all_that_is_wrong_is_told_at_once(look: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = look("placement.rollout.labels.zone=nowhere", "critic.init_from=/nowhere/model")
    assert done.returncode == 1
    assert "error: preflight: 2 problems" in done.stderr
    assert "placement.rollout: bundle 0 of 2" in done.stderr
    assert "has train as zone" in done.stderr
    assert "critic.init_from: node" in done.stderr
    assert "can't read /nowhere/model (No such file or directory)" in done.stderr


def test_a_node_that_is_gone_is_told_apart_from_those_that_answer() -> None:
    [here] = live_nodes()
    gone = Node("10.0.0.9", {}, {}, {}, GONE)
    with probes(NodeProbe, [here, gone], Deadline(30)) as asked:
        answers, raised = asked.ask_all("now", limit_s=20)
    assert list(answers) == [here.name]
    assert not raised
    assert list(asked.lost) == ["10.0.0.9"]


def test_one_node_is_looked_at_and_the_findings_are_kept(
    sft_config: Callable[..., SFTJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = preflight(sft_config(tmp_path / "run"))
    assert not report.problems
    assert {check.name for check in report.checks if check.skipped} == {"clocks", "links"}
    config = sft_config(tmp_path / "run", "policy.model=/nowhere")
    monkeypatch.setattr(train_module, "check", lambda config: EpochInputs(1, None, None))  # type: ignore[arg-type]
    with pytest.raises(PreflightError, match="policy.model: node .* can't read /nowhere"):
        train_module.train(config)


def test_a_cluster_that_shrinks_before_the_launch_is_named(
    sft_config: Callable[..., SFTJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the preflight saw, less a node that only one of the roles could sit on."""
    seen = Report((), {live_nodes()[0].name: ray.get_runtime_context().get_node_id(), "10.0.0.9": GONE}, (), 0.1)
    monkeypatch.setattr(train_module, "preflight", lambda config: seen)
    config = sft_config(tmp_path / "run", "placement.policy.cpus=99", "placement.placement_timeout_s=1")
    with pytest.raises(PlacementError) as caught:
        train_module.train(config)
    assert caught.value.__notes__ == ["Node 10.0.0.9 was there at the preflight and has left the cluster since."]
