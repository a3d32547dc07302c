"""Kills each kind of process of a PPO run in each phase of it, and says how soon the run told whose death it was.

    python -m benchmarks.deaths                       # all of them, on a cluster of its own
    python -m benchmarks.deaths --kind engine --phase generate --phase update

A row is good when the run ended within ten seconds of the death with an `ActorDied` of the right role, or, before the
models were loaded, with a `TaskFailed` of it. Exits with 1 when one is not.
"""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import ray
import typer
from ray.cluster_utils import Cluster

from benchmarks.common import say
from rlhf_ray.actors.waiting import ActorDied, TaskFailed
from rlhf_ray.config.loading import load_config
from rlhf_ray.controllers.train import train
from rlhf_ray.data.prepare import prepare
from rlhf_ray.telemetry.trace import SpanRecorder

CONFIG = Path(__file__).parents[1] / "configs/tiny.yaml"
LIMIT_S = 10.0
PHASES = ("start", "showcase", "generate", "score", "update", "weight_sync", "checkpoint")

# Which process is killed, by how its command line begins, and the roles one of which the error must name. Workers of a
# reward function sit wherever Ray puts them, on the node that dies as well.
KINDS = {
    "actor": ("ray::RolloutWorker", {"rollout"}),
    "engine": ("VLLM::EngineCore", {"rollout"}),
    "rank": ("ray::PolicyWorker", {"policy"}),
    "critic": ("ray::CriticWorker", {"critic"}),
    "scorer": ("ray::TextRewardWorker", {"reward-letters"}),
    "node": ("", {"rollout", "reward-letters"}),
}


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward."""
    return [response.count("e") / (1 + len(response)) for response in responses]


@dataclass(frozen=True)
class Told:
    """What a run said of a death.

    Attributes:
        seconds: from the kill to the end of the run.
        error: its type.
        message: its first line.
        good: whether it was soon enough and named the role.
    """

    seconds: float
    error: str
    message: str
    good: bool


def main(
    kind: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(KINDS)}; all by default.")] = None,
    phase: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(PHASES)}; all by default.")] = None,
) -> None:
    """A table of all cases."""
    kinds, phases, bad = kind or list(KINDS), phase or list(PHASES), 0
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CONFIG.parents[1]), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    with tempfile.TemporaryDirectory(prefix="rlhf_ray-deaths-") as folder, _cluster() as cluster:
        prepare(Path(folder), only={"tiny"})
        say("| killed | phase | deterministic | seconds | error | first line |")
        say("|---|---|---|---|---|---|")
        for killed in kinds:
            for at in phases:
                for deterministic in (True, False) if at == "generate" else (True,):
                    told = _case(killed, at, deterministic, Path(folder), cluster)
                    _wait_for_one_node()
                    bad += not told.good
                    verdict = "" if told.good else "**BAD** "
                    facts = f"{killed} | {at} | {deterministic} | {told.seconds:.1f} | {told.error}"
                    say(f"| {facts} | {verdict}{told.message} |")
    raise typer.Exit(1 if bad else 0)


def _wait_for_one_node() -> None:
    """The head learns of a node's death later than those who talk to it; the next run must not count on that node."""
    deadline = time.monotonic() + 120
    while sum(node["Alive"] for node in ray.nodes()) > 1 and time.monotonic() < deadline:
        time.sleep(0.5)


@contextmanager
def _cluster() -> Iterator[Cluster]:
    """A head on which everything has room; the node that is killed comes for its case."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "labels": {"zone": "head"}})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
    finally:
        cluster.shutdown()


def _case(killed: str, phase: str, deterministic: bool, folder: Path, cluster: Cluster) -> Told:
    overrides = [
        f"policy.model={folder}/models/tiny",
        f"critic.init_from={folder}/models/tiny",
        "reward=[{function: 'benchmarks.deaths:letters', name: letters, workers: 2}]",
        f"data.prompts={folder}/data/tiny_prompts.jsonl",
        f"run.dir={folder}/runs/{killed}-{phase}-{deterministic}",
        "placement.policy.ranks=2",
        "run.steps=6",  # a node takes a second to die, and a step no longer
        "run.checkpoint_every=1",
        "run.tensorboard=false",
        *(f"run.timeouts.{limit}_s=60" for limit in ("rollout", "score", "update", "sync", "checkpoint")),
        f"run.deterministic={str(deterministic).lower()}",
    ]
    pattern, roles = KINDS[killed]
    kill: Callable[[], None] = lambda: _kill(pattern)  # noqa: E731
    if killed == "node":
        node = cluster.add_node(num_cpus=2, labels={"zone": "doomed"})
        zones = {"policy": "head", "critic": "head", "reference": "head", "rollout": "doomed"}
        overrides += [f"placement.{role}.labels={{zone: {zone}}}" for role, zone in zones.items()]
        kill = lambda: cluster.remove_node(node, allow_graceful=False)  # noqa: E731
    config = load_config(CONFIG, overrides)
    # Those limits are for deaths that are not told: then the table says so, and the next case follows.
    with _killing(phase, kill) as killed_s:
        try:
            train(config)
        except (ActorDied, TaskFailed) as error:
            seconds, named = time.monotonic() - killed_s[0], error.role in roles
            good = named and seconds <= LIMIT_S and (isinstance(error, ActorDied) or phase == "start")
            return Told(seconds, type(error).__name__, str(error).partition("\n")[0][:160], good)
        except Exception as error:
            seconds = time.monotonic() - killed_s[0] if killed_s else -1.0
            return Told(seconds, type(error).__name__, str(error).partition("\n")[0][:160], False)
    return Told(-1.0, "none", "the run came to its end", False)


@contextmanager
def _killing(phase: str, kill: Callable[[], None]) -> Iterator[list[float]]:
    """Kill once, when the controller has just entered the phase: the second time if it is one of a step."""
    seen, when = 0, list[float]()
    enter = SpanRecorder.span

    def do() -> None:
        while not when:
            try:
                began = time.monotonic()
                kill()
                when.append(began)
            except LookupError:  # it has not started yet
                time.sleep(0.05)

    def span(recorder: SpanRecorder, name: str, step: int | None = None) -> Any:
        nonlocal seen
        if name == phase:
            seen += 1
            if seen == (1 if phase in ("start", "showcase") else 2):
                threading.Timer(0.02, do).start()
        return enter(recorder, name, step)

    SpanRecorder.span = span  # type: ignore[method-assign,assignment]
    try:
        yield when
    finally:
        SpanRecorder.span = enter  # type: ignore[method-assign]


def _kill(pattern: str) -> None:
    mine = psutil.Process().children(recursive=True)
    found = [process for process in mine if " ".join(_command(process)).startswith(pattern)]
    if not found:
        raise LookupError(pattern)
    os.kill(max(process.pid for process in found), signal.SIGKILL)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


if __name__ == "__main__":
    typer.run(main)
