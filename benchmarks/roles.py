"""Single roles as real actors, made and called as a PPO run makes and calls them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
import ray
import torch

from rlhf_ray.actors.columns import assemble
from rlhf_ray.actors.policy import PolicyGroup, PolicyWorker
from rlhf_ray.actors.rollout import RolloutGroup
from rlhf_ray.actors.trained import UpdateReport
from rlhf_ray.actors.worker import join_collectives_of
from rlhf_ray.algorithms.moments import Moments
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config.algorithm import PPO
from rlhf_ray.config.data import PromptData
from rlhf_ray.config.placement import Cluster, RolePlacement, RolloutPlacement
from rlhf_ray.config.rollout import LoraSync, Rollout
from rlhf_ray.config.run import Timeouts
from rlhf_ray.config.training import Dtype, Policy
from rlhf_ray.controllers.roles import Actors, identities
from rlhf_ray.data.columns import Columns, TrainingShard
from rlhf_ray.data.cursor import PromptCursor
from rlhf_ray.data.minibatches import OptimizerStep, plan_update
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.data.requests import PromptRequest, cut_into_shards, requests_for
from rlhf_ray.data.trajectory import Floats, Trajectory, TrajectoryBatch
from rlhf_ray.engines.rollout_setup import RolloutSetup
from rlhf_ray.models.heads import load_tokenizer

TEMPERATURE = 1.0
SEED = 7
Gpus = Literal[0, 1]
TIMEOUTS = Timeouts()


@contextmanager
def cluster() -> Iterator[None]:
    """A local Ray cluster. Roles reserve no CPUs in it: their threads are what the benchmark says."""
    with ray_session(Cluster(cpus=1), "benchmark"):
        yield


@contextmanager
def rollout_role(
    model: Path, rollout: Rollout, dtype: Dtype, *, threads: int, gpus: Gpus = 0
) -> Iterator[RolloutGroup]:
    """A rollout engine that is ready to generate."""
    placement = RolloutPlacement(cpus=0, gpus=gpus, threads=threads)
    with Actors({"rollout": placement}, TIMEOUTS.setup_s) as actors:
        yield _engines(actors, placement, rollout, RolloutSetup(str(model), rollout.engine, dtype, 1, SEED))


@contextmanager
def policy_role(policy: Policy, *, threads: int) -> Iterator[PolicyGroup]:
    """One rank of the policy, ready to score and train."""
    with Actors({"policy": RolePlacement(cpus=0, threads=threads)}, TIMEOUTS.setup_s) as actors:
        yield _policy(actors, policy, "merged")


@contextmanager
def policy_and_engines(
    policy: Policy, rollout: Rollout, *, threads: int, engines: int = 1, gpus: Gpus = 0, together: bool = False
) -> Iterator[tuple[PolicyGroup, RolloutGroup]]:
    """One rank of the policy and rollout engines, connected for weight transfer.

    Args:
        gpus: of the policy, and of each engine.
        together: an engine sits on the policy's device, and drops its weights when it leaves.
    """
    placement = RolloutPlacement(
        engines=engines, cpus=0, gpus=0 if together else gpus, threads=threads, colocate="policy" if together else None
    )
    setup = RolloutSetup(
        policy.model,
        rollout.engine,
        policy.engine.dtype,
        1,
        SEED,
        adapter_rank=policy.lora.rank if policy.lora and rollout.lora_sync == "adapters" else None,
        beside_policy=together,
        sleep=2 if together else 0,
    )
    trainers = RolePlacement(cpus=0, gpus=gpus, threads=threads)
    with Actors({"policy": trainers, "rollout": placement}, TIMEOUTS.setup_s) as actors:
        group = _engines(actors, placement, rollout, setup)  # first, as they count what is free on their devices
        trainer = _policy(actors, policy, rollout.lora_sync)
        size = rollout.sync_bucket_bytes(on_gpu=gpus > 0)
        trainer.connect(group.actors, 1, size, TIMEOUTS, same_devices=together).wait(TIMEOUTS.setup)
        yield trainer, group


def _engines(actors: Actors, placement: RolloutPlacement, rollout: Rollout, setup: RolloutSetup) -> RolloutGroup:
    group = actors.engines(placement, rollout, TIMEOUTS, deterministic=False)
    group.load_model(setup).wait(TIMEOUTS.setup)
    return group


def _policy(actors: Actors, policy: Policy, lora_sync: LoraSync) -> PolicyGroup:
    identity = identities("policy", 1, SEED, deterministic=False)
    group = actors.own(PolicyGroup[PolicyWorker]("policy", actors.start(PolicyWorker, "policy", 1, identity)))
    join_collectives_of([group], TIMEOUTS)
    group.load_model(policy, PPO(), TEMPERATURE, 1, lora_sync).wait(TIMEOUTS.setup)
    return group


def send_weights(policy: PolicyGroup, version: int) -> float:
    """One weight sync: engines pause, receive and go on. Returns the seconds that it took."""
    began = perf_counter()
    policy.send_weights(version).wait(TIMEOUTS.sync)
    return perf_counter() - began


def sample(rollout: RolloutGroup, requests: Sequence[PromptRequest], version: int) -> TrajectoryBatch:
    """One shard. `version` is that of the policy."""
    [shard] = rollout.generate([requests], version)
    batch: TrajectoryBatch = ray.get(shard.trajectories, timeout=60)
    return batch


def sample_rates(rollout: RolloutGroup, section: Rollout, batches: Sequence[Sequence[PromptRequest]]) -> list[float]:
    """Tokens/s of each batch but the first, which is the warm-up: in shards, each fetched when it is complete."""
    rates = []
    for requests in batches:
        began = perf_counter()
        tokens = 0
        for shard in rollout.generate(cut_into_shards(requests, section.shard_samples), version=0):
            tokens += len(ray.get(shard.trajectories, timeout=60).response_tokens)
        rates.append(tokens / (perf_counter() - began))
    return rates[1:]


@dataclass(frozen=True)
class UpdateBatch:
    """A batch that is ready to train on.

    Attributes:
        batch: all samples.
        old_logprobs: of the policy, float32 `[response tokens]`.
        advantages: before whitening, float32 `[response tokens]`.
        shards: reference to the list of references to each `TrainingShard`.
        starts: number of each shard's first sample.
    """

    batch: TrajectoryBatch
    old_logprobs: Floats
    advantages: Floats
    shards: ray.ObjectRef
    starts: list[int]

    @classmethod
    def of(cls, policy: PolicyGroup, batch: TrajectoryBatch, shard_samples: int) -> "UpdateBatch":
        """Score a batch with the policy, draw random advantages, and put it into Ray's object store in shards."""
        old = policy_logprobs(policy, batch)
        random = np.random.default_rng(SEED)
        advantages = random.standard_normal(len(old)).astype(np.float32)
        whole = TrainingShard(batch, Columns(old_logprobs=old, advantages=advantages))
        starts = list(range(0, len(batch), shard_samples))
        shards = [ray.put(whole.select(range(start, min(start + shard_samples, len(batch))))) for start in starts]
        return cls(batch, old, advantages, ray.put(shards), starts)

    @property
    def moments(self) -> Moments:
        """Of the advantages, for whitening."""
        return Moments.of(torch.from_numpy(self.advantages))

    def plan(self, optimizer_steps: int, micro_batch_tokens: int) -> list[OptimizerStep]:
        """One pass over the batch by one rank."""
        [plan] = plan_update(
            self.batch.prompt_lengths,
            self.batch.response_lengths,
            self.batch.action_lengths,
            epochs=1,
            optimizer_steps=optimizer_steps,
            dp_size=1,
            max_tokens=micro_batch_tokens,
            seed=SEED,
        )
        return plan


def update(policy: PolicyGroup, data: UpdateBatch, optimizer_steps: int, micro_batch_tokens: int) -> UpdateReport:
    """One PPO update, planned here and done by the policy."""
    plan = data.plan(optimizer_steps, micro_batch_tokens)
    [report] = policy.update(data.shards, data.starts, [plan], None, data.moments).wait(TIMEOUTS.update)
    return report


def policy_logprobs(policy: PolicyGroup, batch: TrajectoryBatch) -> Floats:
    """The trainer's log-probs, float32 `[response tokens]`."""
    return assemble(policy.call(PolicyWorker.logprobs, ray.put(batch)).wait(TIMEOUTS.score), batch).numpy()


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
