"""The benchmark's simulation: simulated actors, and everything else as in a real PPO run."""

import json
from pathlib import Path

from benchmarks.simulation.run import LENGTHS, STEPS, Setup, SimulatedActors, run
from rlhf_ray.telemetry.metrics import read_metrics
from rlhf_ray.telemetry.names import find_metric


def test_simulated_actors_go_through_all_of_a_run(tmp_path: Path) -> None:
    costs = run(Setup(samples=64, ranks=1, engines=2), SimulatedActors(), 1000, tmp_path)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, cost in zip(rows, costs, strict=True):
        assert {name for name in row if find_metric(name) is None} == set()
        assert LENGTHS.longest // 3 <= row["response/length_mean"] <= LENGTHS.longest
        assert row["staleness/mean"] == 0, "engines were told the new version"
        assert 0 < cost.thread_s <= cost.cpu_s
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    processes = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert processes == {"policy", "critic", "reference", "reward", "rollout", "controller"}
    assert (tmp_path / f"checkpoints/step_{STEPS:06d}/COMMITTED").exists()
