"""The status of a run that goes on, seen from other processes: what its actors do, and why one died."""

import json
import logging
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import ray

from dashboard import QUERIES, metrics_of
from reward_functions import GATE
from rlhf_ray.actors.waiting import ActorDied
from rlhf_ray.cluster.client import ClusterClient
from rlhf_ray.cluster.session import ClusterError, cluster_facts
from rlhf_ray.controllers.train import train
from rlhf_ray.telemetry.manifest import last_session
from rlhf_ray.telemetry.metrics import read_metrics
from rlhf_ray.telemetry.record import read_record
from rlhf_ray.telemetry.reporter import StatusReporter
from rlhf_ray.telemetry.status import About, ActorStatus, RunStatus
from rlhf_ray.telemetry.status_actor import NAMESPACE, read_status_actor, status_actors
from rlhf_ray.telemetry.trace import SpanRecorder
from runs import WITHIN_S, MakeConfig, status_command

ACTORS = ["critic/0", "policy/0", "reference/0", "reward-gate/0", "rollout/0"]


@pytest.fixture
def gate() -> Iterator[Path]:
    """While it is a file, the reward of a run with `gated` scores."""
    GATE.unlink(missing_ok=True)
    yield GATE
    GATE.unlink(missing_ok=True)


@pytest.fixture
def going_on(gate: Path, tmp_path: Path, tiny: Path, ppo_config: MakeConfig) -> Iterator[tuple[Path, Future[Path]]]:
    """Folder of a PPO run that goes on in a thread, and its end. Many requests wait, as an engine takes two."""
    config = ppo_config(
        tmp_path / "run",
        "reward=[{function: 'reward_functions:gated', name: gate, timeout_s: 600}]",
        f"critic.init_from={tiny}/models/tiny",
        "rollout.engine.max_num_seqs=2",
        "run.steps=1000",
        "run.checkpoint_every=0",
        "run.tensorboard=false",
    )
    with ThreadPoolExecutor(1) as thread:
        end = thread.submit(train, config)
        yield tmp_path / "run", end
        gate.touch()
        if not end.done():  # a test that failed before it ended the run
            snapshot = read_status_actor(last_session(tmp_path / "run").status_actor, 30)
            assert snapshot is not None
            os.kill(by_name(snapshot)["policy/0"].activity.pid, signal.SIGKILL)


def seen(folder: Path, end: "Future[Path]", wanted: Callable[[RunStatus], object]) -> RunStatus:
    """The first status of the run that is as wanted."""
    deadline, last = time.monotonic() + WITHIN_S, None
    while time.monotonic() < deadline:
        assert not end.done(), end.result()
        if (folder / "manifest.json").exists():
            last = read_status_actor(last_session(folder).status_actor, 30)
            if last is not None and wanted(last):
                return last
        time.sleep(0.02)
    raise AssertionError(f"not seen within {WITHIN_S:g} s; last: {last}")


def by_name(status: RunStatus) -> dict[str, ActorStatus]:
    return {actor.name: actor for actor in status.actors}


def phases(status: RunStatus) -> dict[str, str]:
    return {actor.name: actor.activity.phase for actor in status.actors if actor.activity is not None}


def test_a_run_is_watched_from_its_start_to_the_death_of_an_actor(
    going_on: tuple[Path, "Future[Path]"], gate: Path
) -> None:
    folder, end = going_on
    loading = seen(folder, end, lambda status: "load model" in phases(status).values())
    assert loading.progress is None or loading.progress.phase == "start"

    # The gate is closed, so everybody waits for the reward.
    waiting = seen(folder, end, lambda status: phases(status).get("reward-gate/0") == "score")
    actors = by_name(waiting)
    assert list(actors) == ACTORS
    assert {actor.state for actor in waiting.actors} == {"up"}
    said = {name: actor.activity for name, actor in actors.items() if actor.activity is not None}
    assert len({activity.pid for activity in said.values()}) == len(ACTORS)
    assert {activity.node_id for activity in said.values()} == {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    assert all(activity.host_bytes > 50 * 2**20 for activity in said.values())
    assert (said["rollout/0"].running, said["rollout/0"].waiting, said["rollout/0"].version) == (0, 0, 0)
    assert said["policy/0"].running is None

    from_outside = json.loads(status_command(folder, "--json"))
    assert from_outside["about"]["name"] == "tiny"
    assert {f"{actor['role']}/{actor['rank']}": actor["activity"]["pid"] for actor in from_outside["actors"]} == {
        name: activity.pid for name, activity in said.items()
    }
    table = status_command("tiny", "--address", waiting.about.address)
    assert "showcase for" in table
    assert all(f"\n{name} " in table for name in ACTORS)

    gate.touch()
    # Of the sixteen prompts of a step the engine takes two at a time.
    seen(folder, end, _full)
    later = seen(
        folder, end, lambda status: status.progress.step >= 2 and by_name(status)["rollout/0"].activity.version >= 2
    )
    assert later.progress.metrics["throughput/response_tokens_per_s"] > 0
    assert_metrics_are_scraped(later.metrics_urls[0])

    gate.unlink()
    seen(folder, end, lambda status: status.progress.phase == "score" and phases(status)["reward-gate/0"] == "score")
    os.kill(said["policy/0"].pid, signal.SIGKILL)
    killed = seen(folder, end, lambda status: by_name(status)["policy/0"].state == "dead")
    assert killed.last_error.startswith("policy/0: ")
    assert by_name(killed)["policy/0"].activity.pid == said["policy/0"].pid
    assert {actor.state for actor in killed.actors if actor.role != "policy"} == {"up"}
    gate.touch()
    with pytest.raises(ActorDied, match="its process died"):
        end.result(timeout=WITHIN_S)
    record = read_record(folder)
    assert (record.state, record.step) == ("failed", read_metrics(folder)[-1]["step"])
    assert "its process died" in status_command(folder)
    assert status_actors() == []


def _full(status: RunStatus) -> bool:
    """The driver counts shards, and the engine works on as many requests as it may, with more waiting.

    It has a place free now and then, between the end of one request and the start of the next, and what the driver and
    what the engine tell are not of one moment.
    """
    progress, engine = status.progress, by_name(status)["rollout/0"].activity
    assert engine.running <= 2
    counted = progress is not None and progress.phase == "generate" and progress.shards is not None
    full = engine.phase == "generate" and engine.running == 2 and engine.waiting
    return bool(counted and progress.shards.generating and full)


def assert_metrics_are_scraped(url: str) -> None:
    """What the dashboard asks for is there, but for GPUs and for what needs a longer run."""
    asked = {name for _, expression, _ in QUERIES for name in metrics_of(expression)}
    rare = ("ray_node_g", "ray_rlhf_train_", "ray_rlhf_eval_", "ray_rlhf_time_checkpoint", "ray_vllm_num_preemptions")
    wanted = {name for name in asked if not name.startswith(rare)}
    deadline = time.monotonic() + WITHIN_S
    while True:
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        missing = wanted - {line.partition("{")[0].partition(" ")[0] for line in lines}
        if not missing:
            break
        assert time.monotonic() < deadline, f"not exported: {sorted(missing)}"
        time.sleep(0.5)
    [step] = [line for line in lines if line.startswith("ray_rlhf_step{")]
    assert 'run="tiny"' in step
    assert 'job="ppo"' in step
    seconds = [line for line in lines if line.startswith("ray_rlhf_phase_seconds_total{") and 'role="policy"' in line]
    assert any('phase="update"' in line for line in seconds)


def test_a_lookout_outlives_the_process_that_is_connected() -> None:
    with closing(ClusterClient(cluster_facts()["gcs_address"], WITHIN_S)) as client:
        assert client.ask(status_actors) == []
        os.kill(client.ask(os.getpid), signal.SIGKILL)
        with pytest.raises(ClusterError, match="does not answer"):
            client.ask(status_actors)


def test_a_board_that_dies_leaves_the_run_alone(caplog: pytest.LogCaptureFixture) -> None:
    about = About("status_actor-to-kill", "x", "ppo", "/x", cluster_facts()["gcs_address"], "", os.getpid(), 0.0, 3)
    reporter = StatusReporter(about, SpanRecorder(), 0, shards=lambda: None, export=lambda progress: None)
    with caplog.at_level(logging.WARNING, "rlhf_ray"), reporter:
        deadline = time.monotonic() + WITHIN_S
        while (status := read_status_actor(about.status_actor, 30)) is None or status.progress is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ray.kill(ray.get_actor(about.status_actor, namespace=NAMESPACE))
        step = 0
        while not caplog.records:
            assert time.monotonic() < deadline
            step += 1
            reporter.step_done(step, {})
            time.sleep(0.01)
        reporter.watch("policy", [])
    [record] = caplog.records
    assert "the run goes on" in record.message
    assert read_status_actor(about.status_actor, 30) is None
