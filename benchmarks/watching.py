"""What status and metrics cost a run: `python -m benchmarks.watching MODEL`.

Engines: response tokens/s of `RolloutEngine` with vLLM's metrics, which go through Ray, and its queue's length, ÷ the
same without. Each side has a process of its own, and they take turns.

Everything else is so little that only its pieces can be timed: what the training loop does for a step (spans, series,
phases), what the driver's thread does when it tells the status actor, and what an actor does when it is asked.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Annotated

import ray
import typer

from benchmarks.common import (
    CORES,
    ROOT,
    DataOption,
    DtypeOption,
    Findings,
    FreshProcess,
    Measure,
    ModelArgument,
    RepeatsOption,
    RoundsOption,
    ThreadsOption,
    in_turns,
    run_benchmark,
    say,
    spread,
)
from benchmarks.roles import SEED, TEMPERATURE, cluster, prompt_batches
from rlhf_ray.config.rollout import RolloutEngine as EngineConfig
from rlhf_ray.config.rollout import Sampling
from rlhf_ray.data.requests import PromptRequest
from rlhf_ray.engines.rollout_setup import RolloutSetup

_ACTORS = 16
_SPANS = 24


@dataclass(frozen=True)
class Pieces:
    """Seconds that the pieces take.

    Attributes:
        step: what the training loop does beside a step of PPO with `_ACTORS` actors that record `_SPANS` spans each.
        tell: one message of the driver's thread.
        answer: of one actor to the question what it does, in its own process.
        status: of all `_ACTORS` actors, as the status actor gathers it.
    """

    step: float
    tell: float
    answer: float
    status: float


def main(
    model: ModelArgument,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in one repetition.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each response.")] = 48,
    dtype: DtypeOption = "bfloat16",
    data: DataOption = ROOT / "data" / "imdb_prompts.jsonl",
    threads: ThreadsOption = CORES,
    repeats: RepeatsOption = 3,
    rounds: RoundsOption = 2,
    step_s: Annotated[float, typer.Option(min=0.1, help="Seconds of the step that costs are a share of.")] = 5.0,
) -> Findings:
    """What status and metrics cost a run."""
    sampling = Sampling(temperature=TEMPERATURE, max_new_tokens=new_tokens, ignore_eos=True)
    engine = EngineConfig(max_model_len=128, max_num_seqs=64)
    setup = RolloutSetup(str(model), engine, dtype, 1, SEED)
    count = 1 + repeats
    batches = prompt_batches(model, data, prompts, rounds * count, engine.max_model_len - new_tokens)
    found: dict[bool, list[float]] = {True: [], False: []}
    for number, logged in in_turns([True, False], rounds):
        with FreshProcess(threads) as process:
            rates = process.call(_rates, setup, sampling, batches[(number - 1) * count :][:count], logged)
        found[logged] += rates
        side = "with metrics" if logged else "without"
        say(f"round {number}/{rounds}, {side}: {' '.join(f'{rate:,.0f}' for rate in rates)} tokens/s")
    with FreshProcess(1) as process:
        pieces = process.call(_pieces)
    rate = {logged: median(rates) for logged, rates in found.items()}
    return {
        f"{model.name}, {dtype}": [
            Measure(
                "share of a step that the training loop spends on status and metrics",
                100 * pieces.step / step_s,
                "%",
                asked="at most 0.1 %",
            ),
            Measure("response tokens/s with vLLM's metrics ÷ without", rate[True] / rate[False], asked="at least 0.99"),
            Measure("with vLLM's metrics", rate[True], "tokens/s"),
            Measure("without", rate[False], "tokens/s"),
            Measure(f"training loop, a step with {_ACTORS} actors", 1000 * pieces.step, "ms"),
            Measure("driver's thread, one message", 1000 * pieces.tell, "ms"),
            Measure("an actor that is asked", 1000 * pieces.answer, "ms"),
            Measure(f"status of {_ACTORS} actors", 1000 * pieces.status, "ms"),
            spread(*found.values()),
        ]
    }


def _rates(
    setup: RolloutSetup, sampling: Sampling, batches: Sequence[Sequence[PromptRequest]], logged: bool
) -> list[float]:
    """Tokens/s of each batch but the first, which is the warm-up."""
    from rlhf_ray.engines import rollout

    if not logged:
        vars(rollout)["stat_loggers"] = lambda load: []

    async def measure() -> list[float]:
        engine = rollout.RolloutEngine(setup)
        await engine.set_version(0)
        rates = []
        for requests in batches:
            began = time.perf_counter()
            answers = await engine.generate(requests, sampling)
            tokens = sum(len(answer.response_tokens) for answer in answers)
            rates.append(tokens / (time.perf_counter() - began))
        engine.shutdown()
        return rates[1:]

    with cluster():
        return asyncio.run(measure())


def _pieces() -> Pieces:
    # By the name of this module: actors have another main one.
    from benchmarks.watching import _seconds_of
    from rlhf_ray.actors.watched import Watched, actor_class
    from rlhf_ray.telemetry.names import METRICS
    from rlhf_ray.telemetry.ray_metrics import RayMetrics
    from rlhf_ray.telemetry.status import About, Progress, Shards
    from rlhf_ray.telemetry.status_actor import create_status_actor
    from rlhf_ray.telemetry.trace import SpanRecorder

    class Idle(Watched):
        def __init__(self) -> None:
            self.recorder = SpanRecorder()

        def time_answers(self) -> float:
            return _seconds_of(self.activity)

    def step() -> None:
        for _ in range(_ACTORS * _SPANS):
            with recorder.span("work", 1):
                pass
        spans = recorder.drain()
        for role in range(_ACTORS):
            series.phases(f"role{role}", [spans[role * _SPANS : (role + 1) * _SPANS]])
        series.log(1, row)

    with cluster():
        row = {name: 1.0 for name in METRICS if name != "step"}
        recorder, series = SpanRecorder(), RayMetrics("benchmark", "ppo")
        actors = [actor_class(Idle).options(num_cpus=0).remote() for _ in range(_ACTORS)]
        answer = ray.get(actors[0].time_answers.remote(), timeout=300)  # all of them start first
        about = About("benchmark", "benchmark", "ppo", "/", "", "", os.getpid(), time.time(), 1)
        status_actor = create_status_actor(about)
        ray.get(status_actor.watch.remote("role", actors), timeout=120)
        progress = Progress(1, "update", time.time(), Shards(1, 2, 3), row)
        status = _seconds_of(lambda: ray.get(status_actor.status.remote(), timeout=60))
        tell = _seconds_of(lambda: status_actor.tell.remote(replace(progress, since_s=time.time())))
        return Pieces(_seconds_of(step), tell, answer, status)


def _seconds_of(function: Callable[[], object], repeats: int = 50) -> float:
    """Median of several calls."""
    function()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


if __name__ == "__main__":
    run_benchmark(main)
