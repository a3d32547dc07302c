"""What integration tests say about runs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.util import placement_group_table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.data.conversations import ConversationSet
from rlhf_ray.telemetry.metrics import Metrics, read_metrics
from rlhf_ray.telemetry.names import WALL_CLOCK

MakeConfig = Callable[..., PPOJob]

WITHIN_S = 90.0


def without_clock(row: Metrics) -> Metrics:
    """The metrics that two equal runs share."""
    return {name: value for name, value in row.items() if not name.startswith(WALL_CLOCK)}


def exported_weights(folder: Path) -> dict[str, Any]:
    """Tensors of a Hugging Face folder by name."""
    return load_file(folder / "model.safetensors")


def assert_same_run(found: Path, wanted: Path) -> None:
    """The same rows of metrics, times aside, and the same exported weights."""
    rows, wanted_rows = ([without_clock(row) for row in read_metrics(run)] for run in (found, wanted))
    assert rows == wanted_rows
    mine, theirs = exported_weights(found / "export"), exported_weights(wanted / "export")
    assert all(mine[name].equal(tensor) for name, tensor in theirs.items())


def status_command(*arguments: object) -> str:
    """What `rlhf-ray status` prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_ray.cli.app", "status", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def span_names(folder: Path) -> set[str]:
    """What the actors of a run did, as its timeline calls it."""
    events = json.loads((folder / "timeline.json").read_text())
    return {event["name"] for event in (events["traceEvents"] if isinstance(events, dict) else events)}


def transformers_loss(model: Path, rows: ConversationSet) -> float:
    """Mean −log p of the learnt tokens, one row at a time, by transformers' own forward pass and loss."""
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    total = 0.0
    for row in range(len(rows)):
        ids = torch.from_numpy(rows.tokens(row)).long()
        labels = torch.full_like(ids, -100)
        labels[rows.learnt_places(row)] = ids[rows.learnt_places(row)]
        with torch.no_grad():
            mean = theirs(input_ids=ids[None], labels=labels[None]).loss
        total += float(mean) * len(rows.learnt_places(row))
    return total / int(rows.weights.sum())


# In the environment of all processes that these tests start, and so a way to tell them from others.
MARK = {"RLHF_RAY_TESTS": str(os.getpid())}


def engine_processes() -> list[int]:
    """Processes of vLLM's own that belong to these tests."""
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            if process.info["name"].startswith("VLLM") and MARK.items() <= process.environ().items():
                found.append(process.pid)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


def assert_nothing_is_left(within_s: float = 20.0) -> None:
    """No engine, no reserved place and no actor, `within_s` after a job has ended."""
    deadline = time.monotonic() + within_s
    while True:
        places = [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
        actors = [actor["ActorClassName"] for actor in ray._private.state.actors().values() if actor["State"] != "DEAD"]
        engines = engine_processes()
        if not (actors or places or engines):
            return
        assert time.monotonic() < deadline, f"left: actors {actors}, places {places}, engine processes {engines}"
        time.sleep(0.2)
