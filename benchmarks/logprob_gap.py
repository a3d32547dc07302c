"""|log-prob of the engine − log-prob of the trainer| per token: `python -m benchmarks.logprob_gap MODEL`.

The engine samples responses and reports its log-probs; the policy scores the same tokens, as every PPO step does. Once
with the weights that both loaded from disk; then again, on other prompts, after one update of the policy and a weight
sync. The gap between the engine's old log-probs and the updated policy's shows what a sync that did nothing would give.
"""

from statistics import median
from typing import Annotated

import numpy as np
import ray
import typer

from benchmarks.common import (
    CORES,
    RESULTS,
    ROOT,
    DataOption,
    DtypeOption,
    Machine,
    Measure,
    ModelArgument,
    ResultsOption,
    ThreadsOption,
    report,
    run_command,
)
from benchmarks.roles import (
    TEMPERATURE,
    UpdateBatch,
    cluster,
    connect,
    policy_logprobs,
    policy_role,
    prompt_batches,
    rollout_role,
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
    results: ResultsOption = RESULTS,
) -> None:
    """Gap between the engine's and the trainer's log-probs, before and after a weight sync."""
    arguments, machine = dict(locals()), Machine.here()
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
    with (
        cluster(),
        policy_role(policy, threads=threads) as trainer,
        rollout_role(model, rollout, dtype, engines=1, threads=threads) as group,
    ):
        connect(trainer, group, rollout.sync_bucket_mib)
        old = _sample(group, first, version=0)
        before = np.abs(old.engine_logprobs - policy_logprobs(trainer, old))
        update(trainer, UpdateBatch.of(trainer, old, len(old)), 1, _MICRO_BATCH_TOKENS)
        stale = np.abs(old.engine_logprobs - policy_logprobs(trainer, old))
        send_weights(trainer, 1)
        new = _sample(group, second, version=1)
        after = np.abs(new.engine_logprobs - policy_logprobs(trainer, new))
    asked = "at most 1e-4" if dtype == "float32" else ""
    report(
        "logprob_gap",
        f"{model.name}, {dtype}",
        arguments,
        [
            Measure(
                name="mean log-prob gap, engine and trainer as loaded", value=before.mean(), unit="nats", asked=asked
            ),
            Measure(name="mean log-prob gap after update and sync", value=after.mean(), unit="nats", asked=asked),
            Measure(name="largest gap as loaded", value=before.max(), unit="nats"),
            Measure(name="largest gap after update and sync", value=after.max(), unit="nats"),
            Measure(name="median gap after update and sync", value=median(after.tolist()), unit="nats"),
            Measure(name="mean gap if the update had not been synced", value=stale.mean(), unit="nats"),
            Measure(name="tokens compared", value=len(before) + len(after)),
        ],
        machine,
        results,
    )


def _sample(group: RolloutGroup, requests: list[PromptRequest], version: int) -> TrajectoryBatch:
    [shard] = group.generate([requests], version)
    batch: TrajectoryBatch = ray.get(shard.trajectories, timeout=60)
    assert set(batch.weight_versions.tolist()) == {version}, f"sampled with another version than {version}"
    return batch


if __name__ == "__main__":
    run_command(main)
