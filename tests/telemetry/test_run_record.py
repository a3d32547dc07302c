"""A run's folder tells how far it came and how it ended, whoever reads it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.config.data import ComparisonData
from rlhf_ray.config.jobs import Job, RewardModel, RewardModelJob
from rlhf_ray.config.run import EpochRun
from rlhf_ray.recovery.checkpoints import CheckpointStore
from rlhf_ray.telemetry.errors import DamagedFileError
from rlhf_ray.telemetry.manifest import Outcome, end_session, last_session, write_manifest
from rlhf_ray.telemetry.record import read_record

CLUSTER = {"gcs_address": "10.0.0.1:6379", "nodes": []}


def _config(folder: Path) -> Job:
    return RewardModelJob(
        job="reward_model",
        name="demo",
        seed=7,
        reward=RewardModel(model="models/tiny"),
        data=ComparisonData(train="pairs.jsonl"),
        run=EpochRun(dir=str(folder)),
    )


def _start(folder: Path, status_actor: str = "demo-1") -> None:
    write_manifest(folder, _config(folder), CLUSTER, ["rlhf-ray"], status_actor, steps=9)


def _edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sessions"][-1] |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_session_says_where_its_driver_and_its_board_are(tmp_path: Path) -> None:
    _start(tmp_path)
    session = last_session(tmp_path)
    assert (session.name, session.job, session.steps) == ("demo", "reward_model", 9)
    assert (session.address, session.status_actor) == ("10.0.0.1:6379", "demo-1")
    assert (session.host, session.pid) == (socket.gethostname(), os.getpid())
    assert session.end is None


@pytest.mark.parametrize("outcome", ["finished", "failed", "interrupted", "terminated"])
def test_a_run_is_what_its_last_session_ended_as(tmp_path: Path, outcome: Outcome) -> None:
    _start(tmp_path)
    end_session(tmp_path, "failed", "an earlier error")
    _start(tmp_path, "demo-2")
    assert read_record(tmp_path).state == "running"
    end_session(tmp_path, outcome, "policy: update failed")
    record = read_record(tmp_path)
    assert record.state == outcome
    assert record.session.end is not None
    assert record.session.end.error == "policy: update failed"
    sessions = json.loads((tmp_path / "manifest.json").read_text())["sessions"]
    assert [session["end"]["outcome"] for session in sessions] == ["failed", outcome]


def test_step_metrics_and_checkpoint_are_the_newest(tmp_path: Path) -> None:
    _start(tmp_path)
    assert (read_record(tmp_path).step, read_record(tmp_path).checkpoint) == (0, None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time/step_s": 2.5}\n{"step": 2, "time/step_s": 3.5}\n{"st')
    store = CheckpointStore(tmp_path, keep_last=9, keep_best=None)
    for step in (1, 2):
        store.begin(step)
    store.commit(1, {}, {})
    record = read_record(tmp_path)
    assert (record.step, record.metrics, record.checkpoint) == (2, {"time/step_s": 3.5}, 1)


def test_a_driver_that_was_killed_is_lost(tmp_path: Path) -> None:
    over = subprocess.Popen([sys.executable, "-c", ""])
    over.wait()
    _start(tmp_path)
    _edit(tmp_path, pid=over.pid)
    record = read_record(tmp_path)
    assert (record.driver_alive, record.state) == (False, "lost")


def test_of_a_driver_on_another_machine_nothing_is_known(tmp_path: Path) -> None:
    _start(tmp_path)
    _edit(tmp_path, host={"name": "elsewhere"})
    record = read_record(tmp_path)
    assert (record.driver_alive, record.state) == (None, "lost")


def test_a_folder_without_a_run_is_told_apart_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path)
    (tmp_path / "manifest.json").write_text('{"sessions": []}')
    with pytest.raises(DamagedFileError, match=r"manifest\.json"):
        read_record(tmp_path)
    (tmp_path / "manifest.json").write_text('{"sessions": [{"name": "old"}]}')
    with pytest.raises(DamagedFileError, match="its last session .* job: Field required"):
        read_record(tmp_path)


@pytest.mark.parametrize("changes", [{"steps": "many"}, {"host": "head"}, {"end": []}, {"end": {"outcome": "won"}}])
def test_a_session_of_other_values_is_damage(tmp_path: Path, changes: dict[str, object]) -> None:
    _start(tmp_path)
    _edit(tmp_path, **changes)
    with pytest.raises(DamagedFileError, match=f"its last session .* {next(iter(changes))}"):
        read_record(tmp_path)
