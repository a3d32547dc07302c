"""Single roles as real actors, made and called as a PPO run makes and calls them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.common import Dtype
from rlhf_ray.actors.columns import assemble
from rlhf_ray.actors.group import ActorGroup, Seating, create_group
from rlhf_ray.actors.policy import PolicyWorker
from rlhf_ray.actors.rollout import RolloutGroup, RolloutWorker
from rlhf_ray.actors.trained import UpdateReport
from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.algorithms.moments import Moments
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config.algorithm import PPO
from rlhf_ray.config.data import PromptData
from rlhf_ray.config.placement import Cluster, Placed, RolePlacement, RolloutPlacement
from rlhf_ray.config.rollout import LoraSync, Rollout
from rlhf_ray.config.run import Timeouts
from rlhf_ray.config.training import Policy
from rlhf_ray.controllers.roles import join_collectives
from rlhf_ray.data.columns import TrainingColumns
from rlhf_ray.data.cursor import PromptCursor
from rlhf_ray.data.minibatches import OptimizerStep, plan_update
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.data.requests import PromptRequest, requests_for
from rlhf_ray.data.trajectory import Trajectory, TrajectoryBatch
from rlhf_ray.engines.rollout_setup import RolloutSetup
from rlhf_ray.models.heads import load_tokenizer

TEMPERATURE = 1.0
SEED = 7
_TIMEOUTS = Timeouts()


@contextmanager
def cluster() -> Iterator[None]:
    """A local Ray cluster. Roles reserve no CPUs in it: their threads are what the benchmark says."""
    with ray_session(Cluster(cpus=1), "benchmark"):
        yield


@contextmanager
def rollout_role(
    model: Path, rollout: Rollout, dtype: Dtype, *, engines: int, threads: int, adapter_rank: int | None = None
) -> Iterator[RolloutGroup]:
    """Rollout engines that are ready to generate."""
    placement = RolloutPlacement(engines=engines, cpus=0, threads=threads)
    seating = Seating({"rollout": Placed(placement, 1)}, _TIMEOUTS.setup_s, autoscaling=False)
    actors = create_group("rollout", RolloutWorker, seating.seats["rollout"], engines, lambda rank: {"rank": rank})
    group = RolloutGroup(actors.actors, rollout, deterministic=False, timeout_s=_TIMEOUTS.rollout_s)
    try:
        setup = RolloutSetup(str(model), rollout.engine, dtype, 1, SEED, adapter_rank=adapter_rank)
        _wait(group.start_engines(setup, _TIMEOUTS.setup_s), "rollout: load_model")
        yield group
        group.end_engines(_TIMEOUTS.setup_s)
    finally:
        group.kill()
        seating.release()


@contextmanager
def policy_role(policy: Policy, *, threads: int, lora_sync: LoraSync = "merged") -> Iterator[ActorGroup]:
    """One rank of the policy, ready to score and train."""
    seating = Seating(
        {"policy": Placed(RolePlacement(cpus=0, threads=threads), 1)}, _TIMEOUTS.setup_s, autoscaling=False
    )
    group = create_group(
        "policy",
        PolicyWorker,
        seating.seats["policy"],
        1,
        lambda rank: {"role": "policy", "rank": rank, "world_size": 1, "seed": SEED, "deterministic": False},
    )
    try:
        join_collectives([group], _TIMEOUTS)
        _wait(group.call("load_model", policy, PPO(), TEMPERATURE, 1, lora_sync), "policy: load_model")
        yield group
    finally:
        group.kill()
        seating.release()


def connect(policy: ActorGroup, rollout: RolloutGroup, bucket_bytes: int) -> None:
    """Have policy and engines meet for weight transfer."""
    [(host, port)] = _wait([policy.call_one(0, "address")], "policy: address")
    _wait(policy.call("connect", rollout.actors, 1, host, port, bucket_bytes, _TIMEOUTS.sync_s), "policy: connect")


def send_weights(policy: ActorGroup, version: int) -> None:
    """One weight sync: engines pause, receive and go on."""
    _wait(policy.call("send_weights", version), "policy: send_weights")


@dataclass(frozen=True)
class UpdateBatch:
    """A batch that is ready to train on.

    Attributes:
        batch, columns: of all samples together.
        portions: references to the same, some samples each.
        starts: number of each portion's first sample.
    """

    batch: TrajectoryBatch
    columns: TrainingColumns
    portions: list[ray.ObjectRef]
    starts: list[int]

    @classmethod
    def of(cls, policy: ActorGroup, batch: TrajectoryBatch, shard_samples: int) -> "UpdateBatch":
        """Score a batch with the policy, draw random advantages, and put portions of it into Ray's object store."""
        old = policy_logprobs(policy, batch)
        random = np.random.default_rng(SEED)
        advantages = random.standard_normal(len(old)).astype(np.float32)
        nothing = np.zeros_like(old)
        columns = TrainingColumns(old, nothing, advantages, nothing)
        starts = list(range(0, len(batch), shard_samples))
        portions = []
        for start in starts:
            end = min(start + shard_samples, len(batch))
            places = np.arange(batch.response_offsets[start], batch.response_offsets[end])
            portions.append(ray.put((batch.select(range(start, end)), columns.take(places))))
        return cls(batch, columns, portions, starts)

    @property
    def moments(self) -> Moments:
        """Of the advantages, for whitening."""
        return Moments.of(torch.from_numpy(self.columns.advantages))

    def plan(self, optimizer_steps: int, micro_batch_tokens: int) -> list[OptimizerStep]:
        """One pass over the batch by one rank."""
        [plan] = plan_update(
            self.batch.prompt_lengths,
            self.batch.response_lengths,
            epochs=1,
            optimizer_steps=optimizer_steps,
            ranks=1,
            max_tokens=micro_batch_tokens,
            seed=SEED,
        )
        return plan


def update(policy: ActorGroup, data: UpdateBatch, optimizer_steps: int, micro_batch_tokens: int) -> UpdateReport:
    """One PPO update, planned here and done by the policy."""
    plan = data.plan(optimizer_steps, micro_batch_tokens)
    [report] = _wait(policy.call("update", data.portions, data.starts, plan, data.moments), "policy: update")
    return report


def policy_logprobs(policy: ActorGroup, batch: TrajectoryBatch) -> np.ndarray:
    """The trainer's log-probs, float32 `[response tokens]`."""
    return assemble(_wait(policy.call("logprobs", ray.put(batch)), "policy: log-probs"), batch).numpy()


def prompt_batches(
    model: Path, data: Path, samples: int, batches: int, max_prompt_tokens: int
) -> list[list[PromptRequest]]:
    """`batches` of `samples` prompts each, other ones in every batch as far as the file has them."""
    config = PromptData(prompts=str(data), prompts_per_step=1, overlong="truncate")
    prompts = load_prompts(config, load_tokenizer(str(model)), max_prompt_tokens)
    cursor = PromptCursor(len(prompts), SEED, shuffle=True)
    return [requests_for(prompts, cursor.take(samples), 1, SEED) for _ in range(batches)]


def random_batch(vocabulary: int, samples: int, prompt_tokens: int, response_tokens: int) -> TrajectoryBatch:
    """Random tokens; lengths vary by half around the given means."""
    random = np.random.default_rng(SEED)

    def lengths(mean: int) -> Iterator[int]:
        while True:
            yield int(random.integers(max(1, mean // 2), mean + mean // 2 + 1))

    sizes = islice(zip(lengths(prompt_tokens), lengths(response_tokens), strict=True), samples)
    return TrajectoryBatch.of(
        [
            Trajectory(
                uid=f"random-{number}",
                sample_index=0,
                seed=number,
                prompt_tokens=random.integers(0, vocabulary, prompt).tolist(),
                response_tokens=random.integers(0, vocabulary, response).tolist(),
                engine_logprobs=[0.0] * response,
                weight_versions=[0] * response,
                finish_reason="length",
            )
            for number, (prompt, response) in enumerate(sizes)
        ]
    )


def _wait(refs: Sequence[ray.ObjectRef], what: str) -> list[Any]:
    return wait_all(refs, _TIMEOUTS.setup_s, what, "the limit in benchmarks/roles.py")
