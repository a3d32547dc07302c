"""Jobs on a cluster that `ray start --head` made, guarded by a token, through the commands of another process."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]

SFT = """
job: sft
name: tiny-sft
policy:
  model: {tiny}/models/tiny
  engine: {{dtype: float32, micro_batch_tokens: 1024}}
data: {{train: {tiny}/data/tiny_chats_train.jsonl, rows_per_step: 16, max_tokens: 128}}
placement: {{policy: {{cpus: 1}}}}
run: {{dir: runs/a, epochs: 1}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """Environment of a client of a new cluster."""
    temp = Path(mkdtemp(prefix="ray"))  # short: Ray puts sockets in it
    token = secrets.token_hex(16)
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shared = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    shared |= {"PYTHONPATH": str(REPOSITORY), "PATH": binaries, "RAY_AUTH_TOKEN": token, "OMP_NUM_THREADS": "1"}
    dashboard, gcs = free_port(), free_port()
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"),
        *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={temp}", "--disable-usage-stats"),
        *("--dashboard-agent-listen-port=0", "--object-store-memory=200000000"),
    ]
    log = (temp / "start.log").open("w")
    started = subprocess.Popen(command, env=shared | {"RAY_AUTH_MODE": "token"}, stdout=log, stderr=log)
    try:
        yield shared | {
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "GCS": f"127.0.0.1:{gcs}",
            "START_LOG": log.name,
        }
    finally:
        family = [*psutil.Process(started.pid).children(recursive=True), psutil.Process(started.pid)]
        started.terminate()  # with --block it ends what it started
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()
        log.close()
        shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture(scope="module")
def cli(head: dict[str, str], tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """`rlhf-ray` in a folder of its own, with one config in it."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "my.yaml").write_text(SFT.format(tiny=tiny))

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rlhf_ray.cli.app", *arguments]
        return subprocess.run(
            command, cwd=folder, env=head | environment, capture_output=True, text=True, timeout=180, check=False
        )

    deadline = time.monotonic() + 60
    while "no cluster answers" in (tried := run("logs", "none")).stderr:
        assert time.monotonic() < deadline, Path(head["START_LOG"]).read_text()
    assert tried.returncode == 2, tried.stderr
    assert "has no job 'none'" in tried.stderr
    return run


def interrupted_at(word: str, arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and messages of a command that gets Ctrl-C when it shows a word."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_ray.cli.app", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs tests in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    limit = threading.Timer(90, process.kill)
    limit.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if word in line:
                process.send_signal(signal.SIGINT)
                break
        return process.wait(), process.communicate()[1]
    finally:
        limit.cancel()


def test_a_job_succeeds_and_what_it_writes_is_shown(cli: Command, head: dict[str, str]) -> None:
    done = cli("submit", "my.yaml", "run.export=false", "--id", "first")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny-sft step 1/" in done.stdout
    assert "checkpoints" in done.stdout, "what train prints at its end"
    assert "job first succeeded" in done.stderr
    assert head["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr


def test_the_exit_code_of_a_job_that_fails_is_ours(cli: Command) -> None:
    done = cli("submit", "my.yaml", "data.train=/nowhere/rows.jsonl", "--id", "second")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "/nowhere/rows.jsonl" in done.stdout
    again = cli("submit", "my.yaml", "--id", "second")
    assert again.returncode == 1
    assert "has a job of this id already: choose another with --id" in again.stderr


def test_a_job_that_nobody_waits_for_is_shown_and_stopped_later(cli: Command, head: dict[str, str]) -> None:
    submitted = cli("submit", "my.yaml", "run.dir=runs/b", "run.epochs=100000", "--no-wait")
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    code, errors = interrupted_at("checking my.yaml", ["logs", job, "--follow"], head)
    assert code == 130, errors
    assert f"interrupted, but job {job} goes on" in errors
    stopped = cli("stop", job)
    assert (stopped.returncode, stopped.stderr.strip()) == (0, f"job {job} is stopped")
    assert cli("logs", job, "--follow").returncode == 143


def test_a_missing_token_is_an_error_with_the_cure(cli: Command) -> None:
    refused = cli("logs", "first", RAY_AUTH_TOKEN="", HOME="/nowhere")
    assert refused.returncode == 1
    assert "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN" in refused.stderr
    wrong = cli("logs", "first", RAY_AUTH_TOKEN="another")
    assert wrong.returncode == 1
    assert "refuses (Authentication failed" in wrong.stderr
    assert "another" not in wrong.stderr


def test_train_joins_a_cluster_with_a_token_and_is_refused_without(cli: Command, head: dict[str, str]) -> None:
    address = f"cluster.address={head['GCS']}"
    assert cli("preflight", "my.yaml", address).returncode == 0
    for environment in ({"RAY_AUTH_TOKEN": "another"}, {"RAY_AUTH_TOKEN": "", "HOME": "/nowhere"}):
        refused = cli("preflight", "my.yaml", address, **environment)
        assert refused.returncode == 1
        assert f"cluster.address: can't connect to {head['GCS']} (" in refused.stderr
        assert "): set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1, "Ray's own lines for each try are not shown"
