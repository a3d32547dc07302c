"""manifest.json says what a result came from, of every session, and holds no secret."""

import json
import os
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from rlhf_ray.config.data import ComparisonData
from rlhf_ray.config.jobs import Job, RewardModel, RewardModelJob
from rlhf_ray.config.run import EpochRun
from rlhf_ray.telemetry.errors import DamagedFileError
from rlhf_ray.telemetry.manifest import git_state, redact, write_manifest


def _config() -> Job:
    return RewardModelJob(
        job="reward_model",
        name="demo",
        seed=7,
        reward=RewardModel(model="models/tiny"),
        data=ComparisonData(train="pairs.jsonl"),
        run=EpochRun(dir="runs/demo"),
    )


def test_a_session_names_versions_seed_host_cluster_and_command(tmp_path: Path) -> None:
    formats = {"reward.engine.dtype": {"dtype": "float32", "why": "the CPU of this machine is old"}}
    command = ["rlhf-ray", "train", "c.yaml", "api_key=abc"]
    write_manifest(tmp_path / "run", _config(), {"nodes": 2}, command, number_formats=formats)
    (session,) = json.loads((tmp_path / "run/manifest.json").read_text())["sessions"]
    assert (session["name"], session["job"], session["seed"]) == ("demo", "reward_model", 7)
    assert session["command"] == ["rlhf-ray", "train", "c.yaml", "api_key=[redacted]"]
    assert session["cluster"] == {"nodes": 2}
    assert session["number_formats"] == formats
    assert session["versions"]["numpy"][0].isdigit()
    assert session["host"]["cpus"] == os.cpu_count()
    assert session["host"]["memory_bytes"] > 2**26
    assert datetime.fromisoformat(session["started_utc"]).utcoffset() is not None
    assert "git" in session


def test_a_resumption_adds_a_session_and_keeps_the_first(tmp_path: Path) -> None:
    write_manifest(tmp_path, _config(), {"nodes": 2}, ["first"])
    first = json.loads((tmp_path / "manifest.json").read_text())["sessions"]
    write_manifest(tmp_path, _config(), {"nodes": 3}, ["second"])
    sessions = json.loads((tmp_path / "manifest.json").read_text())["sessions"]
    assert sessions[:1] == first
    assert [session["command"] for session in sessions] == [["first"], ["second"]]


def test_what_has_no_utf_8_is_kept_as_it_is(tmp_path: Path) -> None:
    """A file name of other bytes on the command line, or a broken character of a sampled text in an error."""
    name = os.fsdecode(b"run-\xff.yaml")
    write_manifest(tmp_path, _config(), {}, [name, "größer"])
    content = (tmp_path / "manifest.json").read_text(encoding="utf-8")
    assert json.loads(content)["sessions"][0]["command"] == [name, "größer"]
    assert "größer" in content


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"sessions": []}', '{"sessions": [1]}'])
def test_a_manifest_that_cannot_be_read_is_named_and_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DamagedFileError, match=r"manifest\.json.*move it away"):
        write_manifest(tmp_path, _config(), {}, [])
    assert (tmp_path / "manifest.json").read_text() == content


@pytest.mark.parametrize(
    "command",
    [
        ["--token=hunter2"],
        ["--hf-token", "hunter2"],
        ["--hf-token", "-hunter2"],
        ["HF_TOKEN=hunter2"],
        ["HF_TOKEN_READ=hunter2"],
        ["reward.0.token=hunter2"],
        ["token=hunter2 hunter2"],
        ["--password", "hunter2"],
        ["WANDB_API_KEY=hunter2"],
        ["--aws-secret-access-key", "hunter2"],
        ["reward.0.url=https://me:hunter2@rewards.example/score"],
        ["reward.0.url=https://rewards.example/score?n=1&token=hunter2&m=2"],
        ['--runtime-env-json={"env_vars": {"HF_TOKEN": "hunter2", "A": "b"}}'],
        ["--runtime-env-json", '{"env_vars": {"HF_TOKEN": "hunter2 hunter2", "A": "b"}}'],
        ["--header", "Authorization: Bearer hunter2"],
    ],
)
def test_no_secret_of_the_command_line_reaches_the_manifest(command: list[str]) -> None:
    shown = redact(["rlhf-ray", "train", "a.yaml", *command, "run.steps=3"])
    assert "hunter2" not in " ".join(shown)
    assert "[redacted]" in " ".join(shown)
    assert (shown[:3], shown[-1]) == (["rlhf-ray", "train", "a.yaml"], "run.steps=3")


def test_arguments_about_tokens_of_text_stay() -> None:
    command = [
        "rlhf-ray",
        "train",
        "rollout.sampling.max_new_tokens=24",
        "rollout.sampling.stop_token_ids=[1,2]",
        "policy.engine.micro_batch_tokens=2048",
        "reward.0.token_env=REWARD_TOKEN",
        "data.columns.prompt=token_text",
        "reward.0.url=http://localhost:8000/score",
        "--tokenizer",
        "models/tiny",
    ]
    assert redact(command) == command


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_and_changes_of_the_package_are_told(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert git_state(package) is None, "no checkout"
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "commit", "-q", "--allow-empty", "-m", "zero")
    assert git_state(package) is None, "installed inside somebody's repository"
    _git(tmp_path, "add", "package")
    _git(tmp_path, "commit", "-qm", "one")
    assert git_state(package) == {"commit": _git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "notes.txt").write_text("not the package's")
    assert git_state(package) == {"commit": _git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (package / "new.py").write_text("")
    assert git_state(package) == {"commit": _git(tmp_path, "rev-parse", "HEAD"), "dirty": True}


def test_a_machine_without_git_or_with_a_slow_one_has_no_git_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nexec /bin/sleep 20\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path, timeout_s=0.2) is None
    git.unlink()
    assert git_state(tmp_path) is None
