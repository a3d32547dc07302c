"""`rlhf-ray plan`'s times and its search on cluster files: what is printed, and how it exits. No Ray is started."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from rlhf_ray.planner.calibration import default_place, defaults, save_calibration
from rlhf_ray.platform import machine_name

RunCli = Callable[..., Result]

SMALL = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 8,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
CONFIG = """
job: ppo
name: timed
policy: {model: MODEL}
reward:
  - {model: MODEL, name: scores}
rollout:
  sampling: {max_new_tokens: 1024}
  engine: {max_model_len: 2048}
  shard_samples: 32
data: {prompts: nowhere.jsonl, prompts_per_step: 512}
placement:
  policy: {ranks: 4, gpus: 1}
  critic: {ranks: 2, gpus: 1}
  rollout: {engines: 2, gpus: 1}
run: {steps: 10, dir: runs/timed}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job whose data are nowhere, in a process to which nobody named a cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "job.yaml"
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    path.write_text(CONFIG.replace("MODEL", str(tmp_path / "config.json")))
    return path


def test_phases_idle_shares_and_what_they_rest_on_are_told(cli: RunCli, config: Path) -> None:
    shown = cli("plan", config, "--cluster", "8xh100", "--response-tokens", 300).stdout
    assert "One step, in seconds: " in shown
    for line in ("generation", "scoring, from the first responses on", "update of the policy", "weight sync"):
        assert line in shown
    assert "for prompts of 1024 and responses of 300 tokens in the mean, at most 1,024" in shown
    assert "constants of GPUs: defaults, not measured" in shown


def test_shorter_responses_take_less_time(cli: RunCli, config: Path) -> None:
    def seconds(*options: str) -> float:
        out = cli("plan", config, "--cluster", "8xh100", "--nodes", "2", "--json", *options).stdout
        time = json.loads(out)["time"]
        assert time["seconds"] >= max(time["phases"].values())
        assert all(0 <= share < 1 for share in time["idle"].values())
        return float(time["seconds"])

    assert seconds("--response-tokens", "100", "--prompt-tokens", "50") < 0.5 * seconds()


def test_the_search_proposes_overrides_that_can_be_given(cli: RunCli, config: Path) -> None:
    result = cli("plan", config, "--cluster", "8xh100", "--search", "--response-tokens", 300)
    assert result.exit_code == 0, result.stdout + result.stderr
    assert result.stdout.startswith("1. ")
    first = next(line for line in result.stdout.splitlines() if line.startswith("   "))
    again = cli("plan", config, "--cluster", "8xh100", *shlex.split(first))
    assert again.exit_code == 0, again.stdout + again.stderr


def test_a_search_that_finds_nothing_fails(cli: RunCli, config: Path) -> None:
    result = cli("plan", config, "--cluster", "1xl4", "--search")
    assert result.exit_code == 1
    assert "None of the placements that were tried fits: take more or larger machines" in result.stdout


def test_a_slower_calibration_gives_slower_steps(cli: RunCli, config: Path, tmp_path: Path) -> None:
    gpu = defaults("gpu")
    slow = gpu.model_copy(update={"machine": "a slow GPU", "training": gpu.training.model_copy(update={"products": 9})})
    save_calibration(slow, tmp_path / "slow.yaml")

    def run(*options: object) -> dict[str, float]:
        phases: dict[str, float] = json.loads(cli("plan", config, "--cluster", "8xh100", "--json", *options).stdout)[
            "time"
        ]["phases"]
        return phases

    slower = run("--calibration", tmp_path / "slow.yaml")
    assert slower["policy_update"] > 2 * run()["policy_update"]
    assert slower["generate"] == run()["generate"]
    told = cli("plan", config, "--cluster", "8xh100", "--calibration", tmp_path / "slow.yaml").stdout
    assert "constants of GPUs: measured on a slow GPU" in told


def test_a_calibration_of_another_kind_of_device_is_refused(cli: RunCli, config: Path, tmp_path: Path) -> None:
    save_calibration(defaults("cpu"), tmp_path / "cpu.yaml")
    result = cli("plan", config, "--cluster", "8xh100", "--calibration", tmp_path / "cpu.yaml")
    assert result.exit_code == 2
    assert "cpu.yaml: it is of a CPU, but the cluster has GPUs" in result.stderr


def test_bad_values_of_a_calibration_are_told_by_field(cli: RunCli, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("device: gpu\noptimizer: {traffic: -1, step_s: 0}\n")
    result = cli("plan", config, "--cluster", "8xh100", "--calibration", path)
    assert result.exit_code == 2
    assert "optimizer.traffic: input should be greater than or equal to 0 (got -1)" in result.stderr


def test_a_calibration_in_the_users_cache_counts_for_this_machine_alone(
    cli: RunCli, config: Path, tmp_path: Path
) -> None:
    here = machine_name()
    cpus = [f"placement.{role}={{cpus: 1}}" for role in ("policy", "critic", "rollout")]
    for machine, told in ((here, f"measured on {here}"), ("another", "defaults, not measured")):
        save_calibration(defaults("cpu").model_copy(update={"machine": machine}), default_place())
        shown = cli("plan", config, "cluster.cpus=4", "data.prompts_per_step=16", *cpus).stdout
        assert f"constants of CPUs: {told}" in shown


def test_a_calibration_of_another_version_in_the_users_cache_is_told_with_the_cure(cli: RunCli, config: Path) -> None:
    default_place().parent.mkdir(parents=True)
    default_place().write_text("device: cpu\nspeed: 7\n")
    result = cli("plan", config, "cluster.cpus=4")
    assert result.exit_code == 2
    assert str(default_place()) in result.stderr
    assert "speed: " in result.stderr
    assert result.stderr.rstrip().endswith("; `rlhf-ray calibrate` writes the file anew")
