"""|log-prob of the engine − log-prob of the trainer| per token: `python -m benchmarks.logprob_gap MODEL`.

The engine samples responses and reports its log-probs; the policy scores the same tokens, as every PPO step does. Once
with the weights that both loaded from disk; then again, on other prompts, after one update of the policy and a weight
sync. The gap between the engine's old log-probs and the updated policy's shows what a sync that did nothing would give.
"""

from statistics import median
from typing import Annotated

import numpy as np
import typer

from benchmarks.common import (
    CORES,
    ROOT,
    DataOption,
    DtypeOption,
    Findings,
    Measure,
    ModelArgument,
    ThreadsOption,
    run_benchmark,
)
from benchmarks.roles import (
    TEMPERATURE,
    UpdateBatch,
    cluster,
    policy_and_engines,
    policy_logprobs,
    prompt_batches,
    sample,
    send_weights,
    update,
)
from rlhf_ray.actors.rollout import RolloutGroup
from rlhf_ray.config.rollout import Rollout, RolloutEngine, Sampling
from rlhf_ray.config.training import Optimizer, Policy, TrainingEngine
from rlhf_ray.data.requests import PromptRequest
from rlhf_ray.data.trajectory import TrajectoryBatch

_MAX_LENGTH = 128
_MICRO_BATCH_TOKENS = 2048


def main(
    model: ModelArgument,
    dtype: DtypeOption = "float32",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts before, and as many after the sync.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, max=_MAX_LENGTH - 1, help="Longest response.")] = 24,
    lr: Annotated[float, typer.Option(help="Learning rate of the update.")] = 1e-4,
    data: DataOption = ROOT / "data" / "imdb_prompts.jsonl",
    threads: ThreadsOption = CORES,
) -> Findings:
    """Gap between the engine's and the trainer's log-probs, before and after a weight sync."""
    policy = Policy(
        model=str(model),
        engine=TrainingEngine(dtype=dtype, micro_batch_tokens=_MICRO_BATCH_TOKENS),
        optimizer=Optimizer(lr=lr),
    )
    rollout = Rollout(
        sampling=Sampling(temperature=TEMPERATURE, max_new_tokens=new_tokens),
        engine=RolloutEngine(max_model_len=_MAX_LENGTH, max_num_seqs=64),
    )
    first, second = prompt_batches(model, data, prompts, 2, _MAX_LENGTH - new_tokens)
    with cluster(), policy_and_engines(policy, rollout, threads=threads) as (trainer, group):
        old = _sample(group, first, version=0)
        before = np.abs(old.engine_logprobs - policy_logprobs(trainer, old))
        update(trainer, UpdateBatch.of(trainer, old, len(old)), 1, _MICRO_BATCH_TOKENS)
        stale = np.abs(old.engine_logprobs - policy_logprobs(trainer, old))
        send_weights(trainer, 1)
        new = _sample(group, second, version=1)
        after = np.abs(new.engine_logprobs - policy_logprobs(trainer, new))
    asked = "at most 1e-4" if dtype == "float32" else ""
    return {
        f"{model.name}, {dtype}": [
            Measure("mean log-prob gap, engine and trainer as loaded", before.mean(), "nats", asked=asked),
            Measure("mean log-prob gap after update and sync", after.mean(), "nats", asked=asked),
            Measure("largest gap as loaded", before.max(), "nats"),
            Measure("largest gap after update and sync", after.max(), "nats"),
            Measure("median gap after update and sync", median(after.tolist()), "nats"),
            Measure("mean gap if the update had not been synced", stale.mean(), "nats"),
            Measure("tokens compared", len(before) + len(after)),
        ]
    }


def _sample(group: RolloutGroup, requests: list[PromptRequest], version: int) -> TrajectoryBatch:
    batch = sample(group, requests, version)
    assert set(batch.weight_versions.tolist()) == {version}, f"sampled with another version than {version}"
    return batch


if __name__ == "__main__":
    run_benchmark(main)
