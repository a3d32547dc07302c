"""`rlhf-ray status` finds the run that is meant, and answers at once where no cluster does."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from rlhf_ray.config.loading import load_config
from rlhf_ray.telemetry.manifest import end_session, write_manifest

RunCli = Callable[..., Result]
CONFIG = Path(__file__).parents[2] / "configs/tiny_sft.yaml"


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder without runs, and no cluster that the environment names."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def closed() -> str:
    """An address at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(folder: Path, address: str = "127.0.0.1:1", name: str = "tiny") -> Path:
    cluster = {"gcs_address": address, "nodes": []}
    write_manifest(folder, load_config(CONFIG, [f"name={name}"]), cluster, ["rlhf-ray"], f"{name}-1", steps=9)
    return folder


def set_started(folder: Path, utc: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sessions"][-1]["started_utc"] = utc
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_of_a_run_that_ended_the_folder_tells_why(cli: RunCli, tmp_path: Path) -> None:
    end_session(start(tmp_path / "run"), "failed", "policy: update failed")
    done = cli("status", tmp_path / "run")
    assert done.exit_code == 0
    assert "policy: update failed" in done.stdout
    assert "0/9 · no checkpoint" in done.stdout


def test_a_name_is_a_run_in_runs(cli: RunCli, tmp_path: Path) -> None:
    end_session(start(tmp_path / "runs/tiny"), "finished")
    done = cli("status", "tiny", "--json")
    assert (done.exit_code, json.loads(done.stdout)["state"]) == (0, "finished")


def test_without_a_name_it_is_the_run_that_was_started_last(cli: RunCli, tmp_path: Path) -> None:
    for name, utc in (("b", "2026-01-02T00:00:00+00:00"), ("a", "2026-01-03T00:00:00+00:00"), ("c", "2026-01-01")):
        end_session(start(tmp_path / "runs" / name, name=name), "finished")
        set_started(tmp_path / "runs" / name, utc)
    assert json.loads(cli("status", "--json").stdout)["session"]["name"] == "a"


@pytest.mark.parametrize("watch", [[], ["--watch"]])
def test_a_run_whose_cluster_is_gone_is_told_of_once(
    cli: RunCli, tmp_path: Path, closed: str, watch: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    start(tmp_path / "run", closed)
    monkeypatch.undo()
    done = cli("status", tmp_path / "run", "--json", *watch)
    assert (done.exit_code, json.loads(done.stdout)["state"]) == (0, "lost")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "there is no run in"),
        (["nothing"], "there is no folder nothing, and none of a run in runs/nothing"),
        (["empty"], "empty has no manifest.json"),
    ],
)
def test_a_run_that_is_not_there_is_a_bad_argument_with_the_cure(
    cli: RunCli, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    (tmp_path / "empty").mkdir()
    done = cli("status", *arguments)
    assert done.exit_code == 2
    message = " ".join(done.stderr.replace("│", " ").split())
    assert problem in message
    assert "give the folder of a run, or with --address the cluster" in message


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("http://127.0.0.1:8265", "is no address of a Ray cluster"),
        ("head", "is no address of a Ray cluster"),
        (None, "no Ray cluster answers at"),
    ],
)
def test_an_address_that_is_none_or_at_which_nobody_answers_is_told_of(
    cli: RunCli, closed: str, address: str | None, problem: str
) -> None:
    done = cli("status", "--address", address or closed)
    assert done.exit_code == 1
    assert problem in done.stderr
    assert done.stdout == ""


def test_an_address_that_is_given_is_not_passed_over_silently(cli: RunCli, tmp_path: Path, closed: str) -> None:
    done = cli("status", start(tmp_path / "run"), "--address", closed)
    assert done.exit_code == 1
    assert f"no Ray cluster answers at {closed}" in done.stderr


def test_the_environment_names_the_cluster(cli: RunCli, closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", closed)
    assert f"no Ray cluster answers at {closed}" in cli("status", "tiny").stderr
