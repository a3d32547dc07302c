"""Every command that takes a config or a path ends in a few lines and exit code 2, whatever it is given."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from rlhf_ray.cli.failures import MOST_LINES, message_of
from rlhf_ray.config.loading import ConfigError
from rlhf_ray.controllers import inputs
from rlhf_ray.data.errors import MOST_LISTED, DataError, DataErrors

RunCli = Callable[..., Result]

CONFIGS = Path(__file__).parents[2] / "configs"
SFT, PPO = CONFIGS / "tiny_sft.yaml", CONFIGS / "tiny.yaml"
BOMB = "job: sft\na0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
NOWHERE = ("--address", "http://127.0.0.1:9")
# By what it is of: the arguments around it.
COMMANDS: dict[str, tuple[list[object], list[object]]] = {
    "validate": (["validate"], []),
    "train": (["train"], []),
    "plan": (["plan"], []),
    "inspect": (["data", "inspect"], []),
    "preflight": (["preflight"], []),
    "submit": (["submit", *NOWHERE], []),
    "cluster": (["plan", SFT, "--cluster"], []),
    "calibration": (["plan", SFT, "--calibration"], []),
    "export": (["export"], ["out"]),
    "status": (["status"], []),
    "working-dir": (["submit", *NOWHERE, "--working-dir"], [SFT]),
}


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, str]:
    """Paths by what they are."""
    (tmp_path / "bomb.yaml").write_text(BOMB)
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 20_000)
    os.mkfifo(tmp_path / "fifo")
    return {
        "bomb": str(tmp_path / "bomb.yaml"),
        "deep": str(tmp_path / "deep.yaml"),
        "fifo": str(tmp_path / "fifo"),
        "device": "/dev/zero",
        "long": "a" * 5000,
        "newline": "a\nb",
        "surrogate": "\udcff",
        "none": str(tmp_path / "none"),
    }


@pytest.mark.parametrize("kind", ["bomb", "deep", "fifo", "device", "long", "newline", "surrogate", "none"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_hostile_path_is_refused_at_once(command: str, kind: str, hostile: dict[str, str], cli: RunCli) -> None:
    before, after = COMMANDS[command]
    cli("--help")  # what is imported once is not this path's
    began = time.process_time()
    done = cli(*before, hostile[kind], *after)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert 1 <= len(done.stderr.strip().splitlines()) <= 12
    assert len(done.stderr) < 20_000
    assert time.process_time() - began < 20  # the first of these imports torch


def test_where_calibrate_and_prepare_write_is_looked_at_before_they_work(cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file/x", tmp_path, "a" * 5000, "/proc/x"):
        assert cli("calibrate", "--out", out).exit_code == 2
    for folder in (tmp_path / "file", "a" * 5000, "/proc/x"):
        assert cli("prepare", "--only", "tiny", "--dir", folder).exit_code == 2


@pytest.mark.parametrize("kind", ["fifo", "folder", "list", "deep", "device"])
def test_a_manifest_that_is_none_is_told_of_in_a_line(kind: str, cli: RunCli, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text("[1]" if kind == "list" else "[" * 100_000)
    done = cli("status", tmp_path)
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    assert "manifest.json" in done.stderr


@pytest.fixture
def of_sft(prepared: Path) -> list[str]:
    return [
        f"policy.model={prepared}/models/tiny",
        f"data.train={prepared}/data/tiny_chats_train.jsonl",
        f"data.eval={prepared}/data/tiny_chats_eval.jsonl",
    ]


def test_validate_looks_at_the_disk_for_what_the_run_writes(cli: RunCli, of_sft: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for folder, why in (("file", "is a file"), ("file/x", "lies below"), ("loop/x", "leads nowhere")):
        done = cli("validate", SFT, *of_sft, f"run.dir={tmp_path / folder}")
        assert done.exit_code == 2
        assert f"run.dir: {why}" in done.stderr or why in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_more_steps_than_a_run_may_have_are_refused(cli: RunCli, of_sft: list[str], tmp_path: Path) -> None:
    done = cli("validate", SFT, *of_sft, f"run.dir={tmp_path}/run", "run.epochs=1000000000", "data.rows_per_step=1")
    assert done.exit_code == 2
    assert "run.epochs: 1,000,000,000 epochs of 48 rows are 48,000,000,000 steps" in done.stderr


def test_a_reward_module_that_does_not_come_back_is_given_up(
    cli: RunCli, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spinning_reward.py").write_text(
        "while True:\n    try:\n        pass\n    except Exception:\n        pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(inputs, "IMPORT_S", 0.2)
    model = prepared / "models/tiny"
    done = cli(
        "validate",
        PPO,
        f"policy.model={model}",
        f"critic.init_from={model}",
        f"data.prompts={prepared}/data/tiny_prompts.jsonl",
        "reward.0={function: 'spinning_reward:f'}",
        f"run.dir={tmp_path}/run",
    )
    assert done.exit_code == 2
    assert "importing spinning_reward:f took longer than 0.2 s" in done.stderr


def test_a_file_in_which_every_row_is_wrong_gives_twenty_lines_and_counts(
    cli: RunCli, of_sft: list[str], tmp_path: Path
) -> None:
    rows = [{"text": ""} if number % 7 else {"prompt": number} for number in range(3000)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [*of_sft, f"data.train={path}", "data.eval=null", f"run.dir={tmp_path}/run"]
    for command, told in ((["validate"], "stderr"), (["data", "inspect"], "stdout")):
        done = cli(*command, SFT, *overrides)
        assert done.exit_code == 2
        lines = [line for line in getattr(done, told).splitlines() if str(path) in line and "rows.jsonl:" in line]
        assert sum(f"{path}:" in line.split()[0] for line in lines if line.startswith("  ")) == MOST_LISTED
        assert len(done.output) < 6000
        more = [int(line.split()[2].replace(",", "")) for line in done.output.splitlines() if " more like " in line]
        assert sum(more) == len(rows) - MOST_LISTED
    assert "3,000 problems" in done.stderr


def test_the_problems_of_a_file_are_told_by_kind() -> None:
    same = [DataError("f", row, "'text' is empty") for row in range(1, 101)]
    errors = [*same, DataError("f", 101, "is not JSON: column 5"), DataError("f", 102, "x" * 10_000)]
    lines = str(DataErrors("f", errors)).splitlines()
    assert lines[0] == "f: 102 rows can't be used; correct or remove them:"
    assert "  f:101: is not JSON: column 5" in lines
    assert len(lines) == 1 + MOST_LISTED + 1
    assert lines[-1] == "  … and 82 more like that of row 1"
    assert max(map(len, lines)) < 600


def test_of_many_problems_of_a_config_twenty_are_told() -> None:
    lines = message_of(ConfigError("job.yaml", [f"k{number}: unknown key" for number in range(4000)])).splitlines()
    assert lines[0] == "job.yaml has 4,000 problems"
    assert len(lines) == 1 + MOST_LINES + 1
    assert lines[-1] == "  and 3,980 more"
