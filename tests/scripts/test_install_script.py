"""scripts/install.sh with a stub in place of the environment's Python: what it installs, and when."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment whose Python notes how it was called, and does nothing."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\necho "$@" >>{tmp_path}/calls\n')
    python.chmod(0o755)
    return tmp_path / "venv"


def install(venv: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(REPOSITORY / "scripts/install.sh"), *arguments],
        env={**os.environ, "RLHF_RAY_VENV": str(venv)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def installs(venv: Path) -> list[str]:
    """What pip was asked to install, in order."""
    calls = venv.parent / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return [line.split()[-1] for line in lines if " install " in line]


def test_lock_only_leaves_the_package_out(venv: Path) -> None:
    assert install(venv, "gpu", "--lock-only").returncode == 0
    assert installs(venv) == [f"{REPOSITORY}/locks/gpu.txt"]
    assert not (venv / ".rlhf_ray-package").exists()


def test_what_the_lock_only_run_has_installed_is_reused(venv: Path) -> None:
    install(venv, "gpu", "--lock-only")
    install(venv, "gpu")
    assert installs(venv) == [f"{REPOSITORY}/locks/gpu.txt", str(REPOSITORY)]
    install(venv, "gpu")
    assert len(installs(venv)) == 2


def test_another_lock_is_installed_anew(venv: Path) -> None:
    lock = hashlib.sha256(b"another").hexdigest()
    (venv / ".rlhf_ray-lock").write_text(f"gpu {lock}  -\n")
    install(venv, "gpu", "--lock-only")
    assert len(installs(venv)) == 1


@pytest.mark.parametrize("arguments", [["tpu"], ["cpu", "--lock"], ["cpu", "--lock-only", "more"]])
def test_other_arguments_are_refused(venv: Path, arguments: list[str]) -> None:
    done = install(venv, *arguments)
    assert done.returncode == 1
    assert "usage: scripts/install.sh [cpu|gpu] [--lock-only]" in done.stderr
    assert installs(venv) == []
