"""`rlhf-ray submit`, `stop` and `logs` against a stand-in for the cluster."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from rlhf_ray.cluster import jobs
from rlhf_ray.cluster.jobs import Outcome
from rlhf_ray.cluster.package import Package

RunCli = Callable[..., Result]

HEAD = ("--address", "http://head:8265")
CONFIG = """
job: sft
name: small
policy: {model: models/tiny}
data: {train: rows/a.jsonl}
run: {dir: results/small}
"""


class Cluster:
    """What a cluster was asked for, and what it answers."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.submitted: list[tuple[set[str], str, str, dict[str, str]]] = []
        self.follow: Callable[..., Outcome] = lambda name, write: (write("its log\n"), Outcome(0, "job succeeded"))[1]

    def submit(self, content: Package, job_id: str, entrypoint: str, metadata: dict[str, str]) -> None:
        self.submitted.append(({str(file) for file in content.files}, job_id, entrypoint, metadata))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cluster:
    made = Cluster(HEAD[1])
    monkeypatch.setattr(jobs, "Jobs", lambda address: made)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(CONFIG)
    for path in ("rows/a.jsonl", "models/tiny/config.json", "results/small/metrics.jsonl"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("{}\n")
    return made


def test_the_job_is_train_with_the_overrides_and_its_exit_code_is_ours(
    cli: RunCli, cluster: Cluster, tmp_path: Path
) -> None:
    cluster.follow = lambda name, write: (write("its log\n"), Outcome(2, "job failed with exit code 2"))[1]
    done = cli("submit", "my.yaml", "seed=8", "--id", "mine", *HEAD)
    assert (done.exit_code, done.stdout) == (2, "its log\n")
    assert "error: job failed with exit code 2" in done.stderr
    [(files, name, command, metadata)] = cluster.submitted
    assert files == {"my.yaml", "rows/a.jsonl"}, "neither models nor the run folder"
    assert (name, metadata) == ("mine", {"name": "small", "job": "sft", "config": "my.yaml"})
    assert command == (
        f"python -m rlhf_ray.cli.app train my.yaml seed=8 policy.model={tmp_path}/models/tiny "
        f"run.dir={tmp_path}/results/small"
    )


def test_without_waiting_the_id_is_all_of_stdout(cli: RunCli, cluster: Cluster) -> None:
    done = cli("submit", "my.yaml", "--no-wait", *HEAD)
    assert done.exit_code == 0
    [(_, name, _, _)] = cluster.submitted
    assert name.startswith("small-2")
    assert done.stdout == f"{name}\n"
    assert f"rlhf-ray logs {name} --follow --address http://head:8265" in done.stderr
    assert f"rlhf-ray stop {name} --address http://head:8265" in done.stderr


def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(cli: RunCli, cluster: Cluster) -> None:
    def interrupted(name: str, write: Any) -> Outcome:
        raise KeyboardInterrupt

    cluster.follow = interrupted
    done = cli("submit", "my.yaml", "--id", "mine", *HEAD)
    assert done.exit_code == 130
    assert "interrupted, but job mine goes on" in done.stderr
    assert "rlhf-ray stop mine --address http://head:8265" in done.stderr


def test_a_bad_config_is_not_sent(cli: RunCli, cluster: Cluster) -> None:
    done = cli("submit", "my.yaml", "policy.modle=x", *HEAD)
    assert done.exit_code == 2
    assert "did you mean 'model'?" in done.stderr
    assert not cluster.submitted


@pytest.mark.parametrize(
    ("place", "problem"),
    [("elsewhere/my.yaml", "is not in {here}, the folder that is sent"), ("here/runs/my.yaml", "is not sent with its")],
)
def test_a_config_that_would_not_be_there_is_not_sent(
    cli: RunCli, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, problem: str
) -> None:
    for folder in ("elsewhere", "here/runs"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(CONFIG)
    monkeypatch.chdir(tmp_path / "here")
    done = cli("submit", tmp_path / place, *HEAD)
    assert done.exit_code == 2
    assert problem.format(here=tmp_path / "here") in done.stderr
    assert not cluster.submitted


def test_the_address_comes_from_the_environment(cli: RunCli, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(jobs, "Jobs", lambda address: (asked.append(address), cluster)[1])
    monkeypatch.setenv("RAY_ADDRESS", "http://second:8265")
    cli("submit", "my.yaml", "--no-wait")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://first:8265")
    cli("submit", "my.yaml", "--no-wait")
    cli("submit", "my.yaml", "--no-wait", *HEAD)
    assert asked == ["http://second:8265", "http://first:8265", "http://head:8265"]


def test_without_an_address_the_option_is_named(cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    done = cli("logs", "mine")
    assert done.exit_code == 2
    assert "--address" in done.stderr


@pytest.mark.parametrize("job_id", ["a/b", "..", "-a", "a" * 101])
def test_an_id_is_a_plain_word(cli: RunCli, cluster: Cluster, job_id: str) -> None:
    done = cli("submit", "my.yaml", f"--id={job_id}", *HEAD)
    assert done.exit_code == 2
    assert f"'{job_id}' is not made of at most 100 letters, digits" in done.stderr.replace("\n", " ")
    assert not cluster.submitted


def test_what_is_not_sent_is_told(cli: RunCli, cluster: Cluster) -> None:
    done = cli("submit", "my.yaml", "--no-wait", *HEAD)
    assert "policy.model: models/tiny is not sent; the job uses /" in done.stderr
