"""Simulated actors on a local cluster, and PPO steps over them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray

from benchmarks.common import CORES, say
from benchmarks.resident import forget_most, in_use, most_in_use
from benchmarks.simulation.pace import Pace
from benchmarks.simulation.workers import (
    SimulatedCritic,
    SimulatedEngine,
    SimulatedPolicy,
    SimulatedReference,
    SimulatedRewardModel,
)
from rlhf_ray.actors.critic import CriticGroup
from rlhf_ray.actors.devices import Devices
from rlhf_ray.actors.policy import PolicyGroup, PolicyWorker
from rlhf_ray.actors.reference import ReferenceGroup
from rlhf_ray.actors.reward import RewardModelGroup
from rlhf_ray.actors.rollout import RolloutGroup
from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.number_formats import NumberFormats
from rlhf_ray.config.placement import Cluster
from rlhf_ray.controllers.inputs import PPOInputs
from rlhf_ray.controllers.ppo import PPOController
from rlhf_ray.controllers.ppo_roles import PPORoles, RewardPart
from rlhf_ray.controllers.run_folder import Checkpointed, Checkpointing, RunFolder
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.data.trajectory import offsets_of
from rlhf_ray.planner.calibration import defaults
from rlhf_ray.planner.hardware import load_hardware
from rlhf_ray.planner.step_time import StepTime, predict
from rlhf_ray.planner.work import Lengths
from rlhf_ray.telemetry.metrics import Metrics, read_metrics

WORKERS: dict[str, type] = {
    "policy": SimulatedPolicy,
    "critic": SimulatedCritic,
    "reference": SimulatedReference,
    "reward": SimulatedRewardModel,
    "rollout": SimulatedEngine,
}
RANKED = ("policy", "critic", "reference", "reward")
MODEL = "meta-llama/Meta-Llama-3-8B"
LENGTHS = Lengths(prompt=256, response=1024, longest=1536)
VOCABULARY = 128_256
SHARDS_PER_ENGINE = 4
STEPS = 2
"""Of a run: one to warm up, and the one that counts."""
_SHORT_STEP_S = 20.0
_LIMIT_S = 600.0


@dataclass(frozen=True)
class Setup:
    """What one run is made of.

    Attributes:
        samples: of a step.
        ranks: of each of the four roles with ranks.
        engines: for rollouts.
    """

    samples: int
    ranks: int
    engines: int

    @property
    def actors(self) -> int:
        """All of them."""
        return len(RANKED) * self.ranks + self.engines

    @cached_property
    def step(self) -> StepTime:
        """What a real step takes on nodes of eight H100, a GPU for each actor."""
        nodes = load_hardware("8xh100", times=-(-self.actors // 8) + 1)
        return predict(ppo_config(self, Path()), nodes, {"gpu": defaults("gpu")}, LENGTHS)

    def __str__(self) -> str:
        return f"{self.samples:,} samples, {len(RANKED) * self.ranks} ranks, {self.engines} engines"


@dataclass(frozen=True)
class Cost:
    """What a step took of the controller's process.

    Attributes:
        setup: of the run.
        cpu_s: CPU seconds of all threads, Ray's too.
        thread_s: of the controller's own thread.
        bytes: most memory in use, beyond what was when the actors were up.
        row: its metrics.
    """

    setup: Setup
    cpu_s: float
    thread_s: float
    bytes: int
    row: Metrics


class SimulatedActors:
    """Actors of all roles; a run takes as many of them as it wants. They compute nothing, and reserve nothing.

    Attributes:
        start_bytes: memory of this process when those of the first run were up.
    """

    def __init__(self) -> None:
        self._actors: dict[str, list[Any]] = {role: [] for role in WORKERS}
        self.start_bytes = 0

    def roles(self, config: PPOJob, pace: Pace) -> PPORoles:
        """The roles of a run that works at a pace."""
        ranks, engines = config.placement.ranks_of("policy"), config.placement.rollout.engines
        self._start(ranks, engines)
        ranked = {role: self._actors[role][:ranks] for role in RANKED}
        policy = PolicyGroup[PolicyWorker]("policy", ranked["policy"])
        critic, reference = CriticGroup("critic", ranked["critic"]), ReferenceGroup("reference", ranked["reference"])
        reward = RewardModelGroup("reward", ranked["reward"])
        rollout = RolloutGroup(
            self._actors["rollout"][:engines],
            config.rollout,
            deterministic=False,
            timeouts=config.run.timeouts,
        )
        everyone = [actor for group in (policy, critic, reference, reward, rollout) for actor in group.actors]
        _wait([actor.keep.remote(pace) for actor in everyone], "keep")
        sync_s = config.run.timeouts.sync_s
        _wait([rank.connect.remote(rollout.actors, 1, "", 0, 0, sync_s) for rank in policy.actors], "policy: connect")
        parts = (RewardPart("score", 1.0, reward),)
        return PPORoles(policy, critic, reference, parts, rollout, Devices(config, {}))

    def _start(self, ranks: int, engines: int) -> None:
        """Those that are missing, so that a run with few actors and many samples has the memory for itself."""
        began, started = time.perf_counter(), []
        for role, actors in self._actors.items():
            for rank in range(len(actors), ranks if role in RANKED else engines):
                actors.append(ray.remote(WORKERS[role]).options(num_cpus=0).remote(rank))
                started.append(actors[-1].drain_spans.remote())
        if not started:
            return
        _wait(started, "actors to start")
        say(f"{len(started)} more actors are up after {time.perf_counter() - began:.0f} s")
        self.start_bytes = self.start_bytes or in_use()


class MeasuredController(PPOController):
    """The controller, and what each step took of its process."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.measured: list[tuple[float, float, int]] = []

    def train_step(self, step: int) -> None:
        """One PPO step."""
        forget_most()
        process, thread = time.process_time(), time.thread_time()
        super().train_step(step)
        self.measured.append((time.process_time() - process, time.thread_time() - thread, most_in_use()))


def measure_all(setups: Sequence[Setup]) -> list[Cost]:
    """What a step costs in each setup with sleeps cut short; smallest first, as memory once taken stays taken."""
    with ray_session(Cluster(cpus=CORES), "scale"):
        actors = SimulatedActors()
        return [measure(setup, actors, speed=setup.step.seconds / _SHORT_STEP_S) for setup in setups]


def measure_at_pace(setup: Setup) -> Cost:
    """What a step costs at the pace of the real thing."""
    with ray_session(Cluster(cpus=CORES), "scale"):
        return measure(setup, SimulatedActors(), speed=1.0)


def measure(setup: Setup, actors: SimulatedActors, speed: float) -> Cost:
    """What the last step of a run costs; the run is in a folder of its own that is removed afterwards."""
    with TemporaryDirectory(prefix="rlhf_ray-benchmark-") as folder:
        cost = run(setup, actors, speed, Path(folder))[-1]
    say(
        f"{setup}: {cost.cpu_s:.2f} s, {cost.thread_s:.2f} s of them in its own thread, of {setup.step.seconds:.0f} s; "
        f"{cost.bytes / 1e6:.0f} MB"
    )
    return cost


def run(setup: Setup, actors: SimulatedActors, speed: float, folder: Path) -> list[Cost]:
    """Run PPO steps from their start, `speed` times as fast as in reality; what each costs."""
    config = ppo_config(setup, folder)
    inputs = PPOInputs(
        steps=STEPS,
        tokenizer=NumbersAsText(),
        prompts=_prompts(setup.samples),
        same_tokens=[True],
    )
    roles = actors.roles(config, Pace.of(setup.step, config, LENGTHS, speed))
    with RunFolder(config, STEPS, NumberFormats(config, ())) as run_folder:
        assert roles.critic is not None
        trained: dict[str, Checkpointed] = {"policy": roles.policy, "critic": roles.critic}
        checkpointing = Checkpointing(run_folder, trained, config.run.timeouts)
        controller = MeasuredController(config, inputs, roles, run_folder, checkpointing)
        controller.train()
    return [
        Cost(setup, cpu, thread, most - actors.start_bytes, row)
        for (cpu, thread, most), row in zip(controller.measured, read_metrics(folder), strict=True)
    ]


def ppo_config(setup: Setup, folder: Path) -> PPOJob:
    """The config of a run."""
    dtype = {"dtype": "bfloat16"}  # as on the GPUs that these actors stand for
    engine = dtype | {"micro_batch_tokens": 16384}
    shard_samples = max(16, setup.samples // (SHARDS_PER_ENGINE * setup.engines))
    return PPOJob.model_validate(
        {
            "job": "ppo",
            "name": "simulation",
            "policy": {"model": MODEL, "engine": engine},
            "critic": {"init_from": MODEL, "engine": engine},
            "reference": {"engine": dtype},
            "reward": [{"model": MODEL, "name": "score", "engine": dtype}],
            "rollout": {
                "sampling": {"max_new_tokens": LENGTHS.longest},
                "engine": dtype | {"max_model_len": int(LENGTHS.prompt) + LENGTHS.longest, "max_num_seqs": 256},
                "shard_samples": shard_samples,
            },
            "data": {"prompts": "simulated", "prompts_per_step": setup.samples},
            "placement": {
                **{role: {"ranks": setup.ranks, "gpus": 1} for role in RANKED},
                "rollout": {"engines": setup.engines, "gpus": 1},
            },
            "run": {"steps": STEPS, "dir": str(folder), "export": False},
        }
    )


class NumbersAsText:
    """Stands in for the tokenizer, which only the written samples need."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False, **options: Any) -> str:
        """The ids, with spaces between them."""
        return " ".join(map(str, token_ids))


def _prompts(count: int) -> PromptSet:
    tokens = int(LENGTHS.prompt)
    return PromptSet(
        uids=tuple(f"prompt-{number}" for number in range(count)),
        token_ids=np.random.default_rng(0).integers(0, VOCABULARY, count * tokens, np.int32),
        offsets=offsets_of([tokens] * count),
        dropped=0,
        truncated=0,
    )


def _wait(refs: list[ray.ObjectRef], what: str) -> None:
    wait_all(refs, _LIMIT_S, what, "the limit in benchmarks/simulation/run.py")
