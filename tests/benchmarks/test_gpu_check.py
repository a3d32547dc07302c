"""The table of `scripts/gpu_check.sh`: what passes, what fails, what is skipped, and the exit code."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from benchmarks.gpu_check.__main__ import CHECKS
from benchmarks.gpu_check.check import (
    Check,
    CheckFailed,
    Outcome,
    Setting,
    at_most,
    equal,
    exit_code,
    table,
    why_skipped,
)
from benchmarks.gpu_check.process import CheckProcess

CPU = Setting("cpu", 0, Path("tiny"), Path("large"), Path("scratch"))


def right(setting: Setting) -> str:
    return f"on {setting.device} in {os.getpid()}"


def wrong(setting: Setting) -> str:
    return at_most("error", 0.5, 0.1)


def raises(setting: Setting) -> str:
    raise KeyError("no such weight")


def dies(setting: Setting) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def hangs(setting: Setting) -> str:
    time.sleep(60)
    return ""


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CheckProcess]:
    made = CheckProcess(CPU, tmp_path_factory.mktemp("log") / "log")
    yield made
    made.end()


def test_checks_share_a_process_as_long_as_they_pass_or_want_one_of_their_own(process: CheckProcess) -> None:
    first, second = (process.run(Check("a", right)) for _ in range(2))
    assert (first.state, first.found) == ("pass", second.found)
    assert process.run(Check("b", partial(right))).found == first.found
    assert process.run(Check("c", right, alone=True)).found != first.found


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (wrong, "error is 0.5, more than 0.1"),
        (raises, "KeyError: 'no such weight'"),
        (dies, "its process ended (exit code -9)"),
        (hangs, "no result within 1 s"),
    ],
)
def test_whatever_goes_wrong_is_a_failure_and_the_next_check_runs(
    process: CheckProcess, run: object, found: str
) -> None:
    process.run(Check("warm", right))
    outcome = process.run(Check("bad", run, limit_s=1.0 if run is hangs else 60.0))  # type: ignore[arg-type]
    assert (outcome.state, outcome.found) == ("FAIL", found)
    assert process.run(Check("next", right)).state == "pass"


def test_the_table_names_every_check_and_what_came_of_it() -> None:
    outcomes = [
        Outcome("attention", "pass", "error 0.01", 1.234),
        Outcome("sync", "skip", "vllm not installed"),
        Outcome("moves", "FAIL", "1.00 GB were freed, the planner says 2.00", 65.0),
    ]
    assert table(outcomes, "H100").splitlines() == [
        "device: H100",
        "check      result  seconds  found",
        "attention  pass        1.2  error 0.01",
        "sync       skip             vllm not installed",
        "moves      FAIL       65.0  1.00 GB were freed, the planner says 2.00",
        "1 passed, 1 failed, 1 skipped",
    ]


def test_only_a_failure_makes_the_exit_code_1() -> None:
    passed, skipped, failed = (Outcome("a", state, "") for state in ("pass", "skip", "FAIL"))
    assert exit_code([passed, skipped]) == 0
    assert exit_code([passed, failed, skipped]) == 1


def test_what_is_missing_is_said_by_name() -> None:
    assert why_skipped(Check("a", right, needs=("no_torch", "json", "no_ray"), gpus=2), CPU) == (
        "no_torch and no_ray not installed"
    )
    assert why_skipped(Check("a", right, needs=("json",), gpus=2), CPU) == "needs 2 GPUs, here are 0"
    assert why_skipped(Check("a", right), CPU) == ""


def test_kernels_need_no_more_than_torch_and_the_trainer_neither_ray_nor_vllm() -> None:
    by_name = {check.name: check.needs for check in CHECKS}
    assert by_name["attention against float64"] == by_name["log-prob head against float64"] == ()
    assert by_name["moves, ZeRO-3"] == by_name["float32, ZeRO-0"] == ("deepspeed",)
    assert len(by_name) == len(CHECKS)


def test_the_table_is_made_where_ray_vllm_and_deepspeed_are_not_installed() -> None:
    missing = "import sys; sys.modules |= dict.fromkeys(('ray', 'vllm', 'deepspeed'))"
    code = f"{missing}; import benchmarks.gpu_check.__main__"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_nan_and_other_values_are_wrong() -> None:
    for value in (float("nan"), 2.0):
        with pytest.raises(CheckFailed, match="error is"):
            at_most("error", value, 1.0)
    with pytest.raises(CheckFailed, match="version is 1, not 2"):
        equal("version", 1, 2)
