"""`rlhf-ray plan` on cluster files: what it prints, and how it exits. No Ray is started."""

import json
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import pytest
from typer.testing import Result

RunCli = Callable[..., Result]

CONFIG = """
job: ppo
name: planned
policy: {model: meta-llama/Meta-Llama-3-8B, engine: {micro_batch_tokens: 8192}}
critic: {engine: {micro_batch_tokens: 8192}}
reward:
  - {model: meta-llama/Meta-Llama-3-8B, name: scores}
rollout:
  sampling: {max_new_tokens: 1024}
  engine: {max_model_len: 2048}
data: {prompts: nowhere.jsonl, prompts_per_step: 128}
placement:
  policy: {ranks: 2, gpus: 1}
  critic: {ranks: 2, gpus: 1}
  rollout: {engines: 4, gpus: 1}
run: {steps: 10, dir: runs/planned}
"""
LARGE_ENOUGH = (
    "placement.policy.ranks=8",
    "placement.critic.ranks=8",
    "policy.engine.micro_batch_tokens=4096",
    "critic.engine.micro_batch_tokens=4096",
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job whose data are nowhere, in a process to which nobody has named a cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "job.yaml"
    path.write_text(CONFIG)
    return path


def changes_of(result: Result) -> list[list[str]]:
    lines = result.stdout.split("It fits with any of these, nearest first:\n")[1].splitlines()
    return [line.split("   (")[0].split() for line in takewhile(lambda line: "=" in line, lines)]


def test_a_job_that_fits_is_told_what_is_left(cli: RunCli, config: Path) -> None:
    result = cli("plan", config, "--cluster", "8xh100", "--nodes", 3, *LARGE_ENOUGH)
    assert result.exit_code == 0, result.stdout + result.stderr
    assert "Memory on 3 × 8xh100, in GiB, when it is most" in result.stdout
    assert "node-0, H100 0-7" in result.stdout
    assert "It fits. Least is left on " in result.stdout
    assert "KV cache of an engine: " in result.stdout
    assert ", all sequences at once" in result.stdout


def test_a_job_that_does_not_fit_gets_changes_with_which_it_does(cli: RunCli, config: Path) -> None:
    result = cli("plan", config, "--cluster", "8xh100")
    assert result.exit_code == 1
    assert "does not fit" in result.stdout
    assert "node-0, H100 0-1: " in result.stdout
    changes = changes_of(result)
    assert changes
    for change in changes:
        again = cli("plan", config, "--cluster", "8xh100", *change)
        assert again.exit_code == 0, (change, again.stdout)


def test_roles_that_share_devices_are_shown_stage_by_stage(cli: RunCli, config: Path) -> None:
    result = cli("plan", config, "--cluster", "8xh100", "placement.offload_idle=true")
    header = next(line for line in result.stdout.splitlines() if line.split()[:2] == ["role", "load"])
    assert header.split() == ["role", "load", "generate", "score", "update", "sync"]
    assert "node-0, H100 0-1, stage by stage: what each role needs" in result.stdout


def test_json_has_the_same_in_bytes(cli: RunCli, config: Path) -> None:
    result = cli("plan", config, "--cluster", "8xh100", "--json")
    assert result.exit_code == 1
    plan = json.loads(result.stdout)
    assert plan["fits"] is False
    first = plan["memory"][0]
    assert (first["node"], first["device"], first["kind"]) == ("node-0", 0, "H100")
    assert first["headroom"] == first["capacity"] - first["held"] < 0
    policy = first["roles"][0]
    assert (policy["role"], policy["rank"]) == ("policy", 0)
    assert policy["parts"]["weights"] == 2 * 8_030_261_248
    assert sum(policy["parts"].values()) == policy["held"]
    assert plan["changes"]


def test_a_grpo_job_is_planned_with_four_roles_and_no_critic(cli: RunCli, prepared: Path) -> None:
    grpo = Path(__file__).parents[2] / "configs/tiny_grpo.yaml"
    models = [f"policy.model={prepared}/models/tiny", f"reward.0.model={prepared}/models/tiny-reward"]
    result = cli("plan", grpo, *models, "--cluster", "cpu-16", "--json")
    assert result.exit_code == 0, result.stdout + result.stderr
    [host] = json.loads(result.stdout)["memory"]
    beside = {"ray", "object store", "controller"}
    roles = [use["role"] for use in host["roles"] if use["role"] not in beside]
    assert roles == ["policy", "reference", "reward-sentiment", "rollout"]


def test_without_a_cluster_this_machine_is_meant(cli: RunCli, config: Path) -> None:
    result = cli("plan", config, "--json", "placement={}", "cluster.cpus=8")
    plan = json.loads(result.stdout)
    assert plan["cluster"] == "this machine"
    assert [(shelf["node"], shelf["kind"]) for shelf in plan["memory"]] == [("this machine", "host")]


def test_a_role_without_a_place_fails_with_what_it_lacks(cli: RunCli, config: Path) -> None:
    result = cli("plan", config, "--cluster", "cpu-16")
    assert result.exit_code == 1
    assert "placement.policy: bundle 0 of 2 (1 CPU, 1 GPU) has no node: node-0 has 0 GPU." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "8xh1000"], "--cluster 8xh1000: there is no such file or name; did you mean '8xh100'?"),
        (["--cluster", "8xh100", "policy.model=models/nowhere"], "model 'models/nowhere': no such folder"),
        (["--cluster", "8xh100", "policy.engine.zero_stage=4"], "policy.engine.zero_stage: input should be"),
    ],
)
def test_what_can_not_be_planned_is_bad_input(cli: RunCli, config: Path, arguments: list[str], message: str) -> None:
    result = cli("plan", config, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_cluster_file_is_checked_as_strictly_as_a_config(cli: RunCli, config: Path, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("nodes:\n  - {device: H100, devices: 8, cpus: 8, host_memory: 100}\n")
    result = cli("plan", config, "--cluster", cluster)
    assert result.exit_code == 2
    assert "nodes.0.host_memory_gib: is required" in result.stderr
    assert "nodes.0.host_memory: unknown key; did you mean 'host_memory_gib'?" in result.stderr


ON_CPUS = ("placement.policy.gpus=0", "placement.critic.gpus=0", "placement.rollout.gpus=0")


def test_gpus_are_planned_with_bfloat16(cli: RunCli, config: Path) -> None:
    told = "bfloat16 for policy.engine, critic.engine, reference.engine, reward.0.engine, rollout.engine: on GPUs"
    assert told in cli("plan", config, "--cluster", "8xh100").stdout
    found = json.loads(cli("plan", config, "--cluster", "8xh100", "--json").stdout)
    assert found["number_formats"]["policy.engine.dtype"] == {"dtype": "bfloat16", "why": "on GPUs"}
    assert found["warnings"] == []


@pytest.mark.parametrize(("rate", "dtype"), [(0.4, "bfloat16"), (0.01, "float32")])
def test_cpus_are_planned_with_what_they_were_measured_to_be_faster_in(
    cli: RunCli, config: Path, tmp_path: Path, rate: float, dtype: str
) -> None:
    (tmp_path / "cpus.yaml").write_text("nodes:\n  - {count: 4, cpus: 64, host_memory_gib: 900}\n")
    rates = f"{{bfloat16_tflops: {rate}, float32_tflops: 0.1, memory_gb_s: 10}}"
    (tmp_path / "measured.yaml").write_text(f"device: cpu\nrates: {rates}\n")
    files = ("--cluster", tmp_path / "cpus.yaml", "--calibration", tmp_path / "measured.yaml")
    done = cli("plan", config, *ON_CPUS, *files)
    told = f"{tmp_path}/measured.yaml multiplies with {rate} TFLOP/s a core in bfloat16, 0.1 in float32"
    assert f"{dtype} for policy.engine" in done.stdout, done.output
    assert told in done.stdout
    slow = cli("plan", config, *ON_CPUS, *files, "critic.engine.dtype=bfloat16").stdout
    assert ("critic.engine.dtype is bfloat16, but the CPU of" in slow) == (dtype == "float32")


def test_this_machine_is_planned_as_it_is(cli: RunCli, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    done = cli("plan", config, *ON_CPUS, "cluster.cpus=64")
    assert "the CPU of this machine is held to AVX2 by ONEDNN_MAX_CPU_ISA" in done.stdout, done.output
