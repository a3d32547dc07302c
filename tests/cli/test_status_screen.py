"""The status of a run as a table: what is known is shown, what is not is left out."""

import json
from dataclasses import replace

import pytest

from rlhf_ray.cli.status_screen import Screen, duration
from rlhf_ray.telemetry.manifest import End, Session
from rlhf_ray.telemetry.record import RunRecord
from rlhf_ray.telemetry.status import About, Activity, ActorState, ActorStatus, Progress, RunStatus, Shards

NOW = 10_000.0
ABOUT = About("tiny-1", "tiny", "ppo", "/data/runs/tiny", "10.0.0.1:6379", "10.0.0.1", 77, NOW - 500, 30)
METRICS = {"time/step_s": 8.14, "throughput/response_tokens_per_s": 790.4, "throughput/train_tokens_per_s": 1230.0}
PROGRESS = Progress(12, "generate", NOW - 3.2, Shards(4, 2, 10), METRICS)


def actor(role: str, rank: int = 0, state: ActorState = "up", error: str = "", **said: object) -> ActorStatus:
    activity = Activity("update", NOW - 65, "10.0.0.1", "aaaa1", 100 + rank, 3 * 2**29)
    return ActorStatus(role, rank, state, NOW - 4, replace(activity, **said), error)


def status(*actors: ActorStatus, progress: Progress | None = PROGRESS) -> RunStatus:
    return RunStatus(NOW, ABOUT, progress, NOW - 0.4, actors, ("http://10.0.0.1:8080/metrics",))


def shown(capsys: pytest.CaptureFixture[str], *snapshots: RunStatus | RunRecord, live: bool = False) -> list[str]:
    """Lines without their trailing blanks."""
    with Screen(live=live, as_json=False) as screen:
        for snapshot in snapshots:
            screen.show([snapshot])
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_run_is_shown_with_step_phase_rates_queue_and_where_its_metrics_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = shown(capsys, status(actor("policy"), actor("rollout", running=10, waiting=3, version=4)))
    assert lines == [
        "run         tiny (ppo) · /data/runs/tiny",
        "driver      10.0.0.1, process 77 · up for 8 min 20 s",
        "step        12/30 · generate for 3.2 s",
        "last step   8.1 s · 790 response tokens/s · 1,230 train tokens/s",
        "shards      4 waiting · 2 generating · 10 generated",
        "metrics     http://10.0.0.1:8080/metrics",
        "last error  none",
        "",
        "actor      node      process  state  phase   for        memory   requests               weights",
        "policy/0   10.0.0.1  100      up     update  1 min 5 s  1.5 GiB",
        "rollout/0  10.0.0.1  100      up     update  1 min 5 s  1.5 GiB  10 running, 3 waiting  4",
    ]


def test_a_dead_actor_is_shown_with_its_last_phase_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, status(actor("critic", state="dead", error="its node is gone")))
    assert "last error  critic/0: its node is gone" in lines
    assert lines[-1].split() == ["critic/0", "10.0.0.1", "100", "dead", "update", "1.5", "GiB"]


def test_actors_that_start_or_do_not_answer_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    starting = ActorStatus("reference", 0, "starting", None, None, "")
    lines = shown(capsys, status(starting, actor("policy", state="silent")))
    assert lines[-2] == "reference/0                     starting"
    assert "silent for 4.0 s" in lines[-1]


def test_idle_actors_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, status(actor("policy", phase="", device_bytes=(60 * 2**30, 80 * 2**30))))
    assert lines[-1] == "policy/0  10.0.0.1  100      up     idle   1 min 5 s  1.5 GiB  60.0 GiB of 80.0 GiB"


def test_many_ranks_that_do_the_same_are_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = ["1"] * 6 + ["2"] * 3
    ranks = [actor("policy", rank, node_id=node, node=f"10.0.0.{node}") for rank, node in enumerate(nodes)]
    ranks[2] = replace(ranks[2], activity=replace(ranks[2].activity, phase="", host_bytes=9 * 2**30))
    rows = [" ".join(line.split()[:2]) for line in shown(capsys, status(*ranks))[-4:]]
    assert rows == ["policy/0–1 10.0.0.1", "policy/2 10.0.0.1", "policy/3–5 10.0.0.1", "policy/6–8 10.0.0.2"]
    few = shown(capsys, status(*ranks[:8]))
    assert [line.split()[0] for line in few[-8:]] == [f"policy/{rank}" for rank in range(8)]


def test_of_several_ranks_in_a_row_the_largest_memory_counts(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = [actor("policy", rank, host_bytes=(rank + 1) * 2**30, running=1, waiting=2) for rank in range(9)]
    assert shown(capsys, status(*ranks))[-1].split("  ")[-2:] == ["≤ 9.0 GiB", "9 running, 18 waiting"]


def test_nodes_that_share_an_address_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, status(actor("policy"), actor("critic", node_id="bbbb2")))
    assert ["10.0.0.1 (aaaa)" in lines[-2], "10.0.0.1 (bbbb)" in lines[-1]] == [True, True]


def test_a_driver_that_says_nothing_is_called_silent(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, replace(status(progress=None), heard_s=NOW - 90))
    assert lines[1].endswith("up for 8 min 20 s · silent for 1 min 30 s")
    assert lines[2] == "step        0/30 · starting"


def record(end: End | None = None, *, driver_alive: bool | None = False) -> RunRecord:
    session = Session("tiny", "ppo", "2026-01-01T00:00:00+00:00", "10.0.0.1:6379", "tiny-1", "head", 77, 30, end)
    return RunRecord("/data/runs/tiny", session, 12, METRICS, 10, driver_alive)


def test_a_failed_run_is_shown_with_step_checkpoint_and_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, record(End("2026-01-01T01:00:00+00:00", "failed", "policy: update failed"))) == [
        "run         tiny (ppo) · /data/runs/tiny",
        "state       failed at 2026-01-01T01:00:00+00:00",
        "started     2026-01-01T00:00:00+00:00",
        "step        12/30 · newest checkpoint of step 10",
        "last step   8.1 s · 790 response tokens/s · 1,230 train tokens/s",
        "last error  policy: update failed",
    ]


@pytest.mark.parametrize(
    ("driver_alive", "words"), [(True, "its driver (head, process 77) is there"), (False, "lost"), (None, "lost")]
)
def test_a_run_without_an_end_is_running_or_lost(
    capsys: pytest.CaptureFixture[str], driver_alive: bool | None, words: str
) -> None:
    name, _, state = shown(capsys, record(driver_alive=driver_alive))[1].partition("  ")
    assert name == "state"
    assert state.strip().startswith(words)


def test_without_a_terminal_watching_prints_a_line_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    first = status(actor("policy"))
    same = replace(first, now_s=NOW + 1)
    moved = replace(first, progress=replace(PROGRESS, phase="update"))
    lines = shown(capsys, first, same, moved, record(End("", "failed", "out of memory")), live=True)
    assert lines[-2:] == ["tiny · step 12/30 · update", "tiny · failed · step 12/30 · out of memory"]
    assert len(lines) == 10 + 2


def test_json_is_a_line_for_each_run_with_all_that_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(live=True, as_json=True) as screen:
        screen.show([status(actor("policy")), record(End("", "finished", ""))])
    live, over = map(json.loads, capsys.readouterr().out.splitlines())
    assert (live["state"], live["progress"]["step"], live["actors"][0]["activity"]["pid"]) == ("running", 12, 100)
    assert (over["state"], over["session"]["end"]["outcome"]) == ("finished", "finished")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0.0 s"), (3.21, "3.2 s"), (59.96, "60.0 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")],
)
def test_durations_are_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
