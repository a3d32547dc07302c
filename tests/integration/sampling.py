"""Greedy responses of the engines, and what transformers' own model says to the same prompts."""

from collections.abc import Sequence
from typing import cast

import ray
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.actors.rollout import RolloutWorker
from rlhf_ray.actors.shards import GeneratedShard, ShardFacts
from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.config.rollout import Sampling
from rlhf_ray.controllers.ppo_roles import PPORoles
from rlhf_ray.data.requests import PromptRequest
from rlhf_ray.data.trajectory import TrajectoryBatch

GREEDY = Sampling(temperature=0.0, max_new_tokens=12, ignore_eos=True)


def greedy(weights: dict[str, torch.Tensor], model: str, requests: Sequence[PromptRequest]) -> list[list[int]]:
    """Tokens of transformers' own model with these weights, one prompt and one token at a time."""
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs.load_state_dict(weights, strict=False)
    responses = []
    for request in requests:
        tokens = request.tokens.tolist()
        for _ in range(GREEDY.max_new_tokens):
            with torch.no_grad():
                tokens.append(int(theirs(torch.tensor([tokens])).logits[0, -1].argmax()))
        responses.append(tokens[len(request.tokens) :])
    return responses


def as_shard(batch: TrajectoryBatch, number: int = 0, shards: int = 1) -> GeneratedShard:
    """A batch as one of a step's shards."""
    return GeneratedShard(number, shards, ray.put(batch), ShardFacts.of(batch, 0))


def generated(roles: PPORoles, engine: int, requests: Sequence[PromptRequest], version: int) -> TrajectoryBatch:
    """What one engine says; `version` is the newest of the policy."""
    batch, _ = roles.rollout.call_rank_for_two(engine, RolloutWorker.generate, requests, GREEDY, version)
    return cast(TrajectoryBatch, wait_all([batch], 60, "rollout: generate", "")[0])
