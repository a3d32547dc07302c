"""A run that is ended from outside, or whose Ray daemons are, ends within seconds, says how to go on, and notes it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rlhf_ray.config.jobs import SFTJob
from rlhf_ray.config.loading import dump_config
from rlhf_ray.telemetry.manifest import last_session

ENDS_WITHIN_S = 20.0
"""Seconds on a machine that has nothing else to do; Ray itself would take 60 or more."""


@pytest.mark.parametrize(
    ("target", "number", "code", "outcome", "said"),
    [
        ("group", signal.SIGTERM, 143, "terminated", "terminated; the same command resumes it from the checkpoint of"),
        ("raylet", signal.SIGKILL, 1, "failed", "error: the Ray cluster of this run is gone: raylet (process "),
    ],
)
def test_a_run_ends_with_its_last_words(
    sft_config: Callable[..., SFTJob],
    tmp_path: Path,
    target: str,
    number: signal.Signals,
    code: int,
    outcome: str,
    said: str,
) -> None:
    folder = tmp_path / "run"
    config = sft_config(folder, "run.epochs=1000", "run.checkpoint_every=1", "run.export=false", "run.eval_every=0")
    (tmp_path / "my.yaml").write_bytes(dump_config(config).encode())
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_ray.cli.app", "train", str(tmp_path / "my.yaml")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    log = []
    for line in process.stderr:
        log.append(line)
        if " step 2/" in line:
            break
    try:
        began = time.monotonic()
        if target == "group":
            os.killpg(process.pid, number)
        else:
            [daemon] = [child for child in psutil.Process(process.pid).children() if child.name() == target]
            daemon.send_signal(number)
        found = process.wait(timeout=60)
        seconds = time.monotonic() - began
        log += process.stderr.readlines()
    finally:
        process.kill()
    words = "".join(log)
    assert found == code, words
    assert seconds < ENDS_WITHIN_S
    [last] = [line for line in log if said in line]
    assert "the same command resumes it from the checkpoint of step " in last
    assert "Traceback" not in words
    end = last_session(folder).end
    assert end is not None
    assert end.outcome == outcome
