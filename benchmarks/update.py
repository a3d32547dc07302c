"""Tokens/s of the policy's PPO update, against a plain torch loop: `python -m benchmarks.update MODEL`.

Ours is the `update` of a real `PolicyWorker` actor with its DeepSpeed engine, on shards in Ray's object store, from
planning the micro-batches to the report. Bare is `bare_update.BareLoop` on the same micro-batches, packed before the
clock starts: transformers' model with the same attention over packs, the vocabulary head at the response positions,
log-softmax, the clipped loss, gradient clipping, fused AdamW over float32 weights. It leaves out what ours also does:
entropy, logits in chunks, statistics, checks for NaN, the ways through Ray. Both stay alive and take turns, so that
each repetition of one side has its neighbour of the other. That the gradient norms agree shows that both did the same
work.
"""

from statistics import median
from time import perf_counter
from typing import Annotated

import typer

from benchmarks.bare_update import BareLoop
from benchmarks.common import (
    CORES,
    DtypeOption,
    Findings,
    FreshProcess,
    Measure,
    ModelArgument,
    RepeatsOption,
    ThreadsOption,
    run_benchmark,
    say,
    spread,
)
from benchmarks.roles import UpdateBatch, cluster, policy_role, random_batch, update
from rlhf_ray.config.algorithm import PPO
from rlhf_ray.config.training import Optimizer, Policy, TrainingEngine
from rlhf_ray.models.heads import load_config


def main(
    model: ModelArgument,
    dtype: DtypeOption = "bfloat16",
    samples: Annotated[int, typer.Option(min=1, help="Samples in one update.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Mean length of a prompt.")] = 64,
    response_tokens: Annotated[int, typer.Option(min=1, help="Mean length of a response.")] = 64,
    optimizer_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of one update.")] = 1,
    micro_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one forward and backward pass.")] = 2048,
    zero_stage: Annotated[int, typer.Option(min=0, max=3, help="DeepSpeed's ZeRO stage.")] = 2,
    shard_samples: Annotated[int, typer.Option(min=1, help="Samples of one shard.")] = 8,
    threads: ThreadsOption = CORES,
    repeats: RepeatsOption = 5,
) -> Findings:
    """Tokens/s of the policy update, as a share of a bare torch loop's."""
    policy = Policy(
        model=str(model),
        engine=TrainingEngine.model_validate(
            {"zero_stage": zero_stage, "dtype": dtype, "micro_batch_tokens": micro_batch_tokens}
        ),
        # So slow that the policy stays where it is, and every repetition does the same.
        optimizer=Optimizer(lr=1e-8),
    )
    batch = random_batch(load_config(str(model)).vocab_size, samples, prompt_tokens, response_tokens)
    tokens = len(batch.prompt_tokens) + len(batch.response_tokens)
    ours: list[float] = []
    inside: list[float] = []
    bare: list[float] = []
    with cluster(), policy_role(policy, threads=threads) as group, FreshProcess(threads) as process:
        data = UpdateBatch.of(group, batch, shard_samples)
        plan = data.plan(optimizer_steps, micro_batch_tokens)
        process.make(BareLoop, policy, PPO(), data.batch, data.old_logprobs, data.advantages, data.moments, plan)
        for number in range(repeats + 1):  # the first is the warm-up
            began = perf_counter()
            done = update(group, data, optimizer_steps, micro_batch_tokens)
            ours.append(perf_counter() - began)
            inside.append(done.seconds)
            reference = process.ask(BareLoop.update)
            bare.append(reference.seconds)
            say(f"{number}/{repeats}: ours {ours[-1]:.3f} s, bare {reference.seconds:.3f} s")
    rate, rate_inside, rate_bare = (tokens / median(seconds[1:]) for seconds in (ours, inside, bare))
    norm = done.means["grad_norm"].value
    micro_batches = sum(len(step.micro_batches) for step in plan)
    return {
        f"{model.name}, {dtype}": [
            Measure("policy-update tokens/s ÷ bare torch", rate / rate_bare, asked="at least 0.90"),
            Measure("the same inside the actor", rate_inside / rate_bare),
            Measure("policy update", rate, "tokens/s"),
            Measure("bare torch", rate_bare, "tokens/s"),
            Measure("tokens in one update", tokens),
            Measure("micro-batches in one update", micro_batches),
            Measure("relative difference of the gradient norms", abs(norm / reference.grad_norm - 1)),
            spread(ours[1:], bare[1:]),
        ]
    }


if __name__ == "__main__":
    run_benchmark(main)
