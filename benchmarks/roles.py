"""Single roles as real actors, made and called as a PPO run makes and calls them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import ray
import torch

from benchmarks.common import Dtype
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
from rlhf_ray.config.training import Policy
from rlhf_ray.controllers.roles import Actors, identities
from rlhf_ray.data.columns import Columns, TrainingShard
from rlhf_ray.data.cursor import PromptCursor
from rlhf_ray.data.minibatches import OptimizerStep, plan_update
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.data.requests import PromptRequest, requests_for
from rlhf_ray.data.trajectory import Floats, Trajectory, TrajectoryBatch
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
    with Actors({"rollout": placement}, _TIMEOUTS.setup_s) as actors:
        group = actors.engines(placement, rollout, _TIMEOUTS, deterministic=False)
        setup = RolloutSetup(str(model), rollout.engine, dtype, 1, SEED, adapter_rank=adapter_rank)
        group.load_model(setup).wait(_TIMEOUTS.setup)
        yield group


@contextmanager
def policy_role(policy: Policy, *, threads: int, lora_sync: LoraSync = "merged") -> Iterator[PolicyGroup]:
    """One rank of the policy, ready to score and train."""
    with Actors({"policy": RolePlacement(cpus=0, threads=threads)}, _TIMEOUTS.setup_s) as actors:
        identity = identities("policy", 1, SEED, deterministic=False)
        group = actors.own(PolicyGroup[PolicyWorker]("policy", actors.start(PolicyWorker, "policy", 1, identity)))
        join_collectives_of([group], _TIMEOUTS)
        group.load_model(policy, PPO(), TEMPERATURE, 1, lora_sync).wait(_TIMEOUTS.setup)
        yield group


def connect(policy: PolicyGroup, rollout: RolloutGroup, bucket_bytes: int) -> None:
    """Have policy and engines meet for weight transfer."""
    policy.connect(rollout.actors, 1, bucket_bytes, _TIMEOUTS, same_devices=False).wait(_TIMEOUTS.setup)


def send_weights(policy: PolicyGroup, version: int) -> None:
    """One weight sync: engines pause, receive and go on."""
    policy.send_weights(version).wait(_TIMEOUTS.sync)


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
    [report] = policy.update(data.shards, data.starts, [plan], None, data.moments).wait(_TIMEOUTS.update)
    return report


def policy_logprobs(policy: PolicyGroup, batch: TrajectoryBatch) -> Floats:
    """The trainer's log-probs, float32 `[response tokens]`."""
    return assemble(policy.call(PolicyWorker.logprobs, ray.put(batch)).wait(_TIMEOUTS.score), batch).numpy()


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
