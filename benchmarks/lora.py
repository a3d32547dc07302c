"""What adapters change: `python -m benchmarks.lora MODEL`.

The same model once with all weights trained and once with adapters, and with these both ways of weight sync: share of
the weights that is trained, size of a checkpoint, time of a weight sync, and response tokens/s of the engine after it.
Both ways live in one process each, one after the other.
"""

import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated

import ray
import typer

from benchmarks.common import (
    CORES,
    ROOT,
    DataOption,
    DtypeOption,
    Findings,
    Measure,
    ModelArgument,
    RepeatsOption,
    ThreadsOption,
    run_benchmark,
    say,
)
from benchmarks.roles import TEMPERATURE, cluster, policy_and_engines, policy_role, prompt_batches, send_weights
from rlhf_ray.actors.policy import PolicyGroup, PolicyWorker
from rlhf_ray.actors.rollout import RolloutGroup
from rlhf_ray.config.rollout import LoraSync, Rollout, RolloutEngine, Sampling
from rlhf_ray.config.run import Limit
from rlhf_ray.config.training import Lora, Policy, TrainingEngine
from rlhf_ray.data.requests import PromptRequest, cut_into_shards

_MEGABYTE = 1e6


def main(
    model: ModelArgument,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    dtype: DtypeOption = "bfloat16",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in one repetition.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each response.")] = 32,
    data: DataOption = ROOT / "data" / "imdb_prompts.jsonl",
    threads: ThreadsOption = CORES,
    repeats: RepeatsOption = 3,
) -> Findings:
    """Sizes with and without adapters, and times of both ways of weight sync."""
    engine = TrainingEngine.model_validate({"dtype": dtype})
    plain = Policy(model=str(model), engine=engine)
    adapted = Policy(model=str(model), engine=engine, lora=Lora(rank=rank))
    base = Rollout(
        sampling=Sampling(temperature=TEMPERATURE, max_new_tokens=new_tokens, ignore_eos=True),
        engine=RolloutEngine(max_model_len=128, max_num_seqs=64),
    )
    batches = prompt_batches(model, data, prompts, 1 + repeats, 128 - new_tokens)
    with cluster():
        with policy_role(plain, threads=threads) as trainer:
            whole = _checkpoint_bytes(trainer)
        found: dict[LoraSync, tuple[list[float], list[float]]] = {}
        ways: tuple[LoraSync, ...] = ("merged", "adapters")
        for sync in ways:
            rollout = base.model_copy(update={"lora_sync": sync})
            with policy_and_engines(adapted, rollout, threads=threads) as (trainer, engines):
                trained, weights = _counts(trainer)
                small = _checkpoint_bytes(trainer)
                found[sync] = _measure(trainer, engines, batches, rollout)
    return {
        f"{model.name}, {dtype}, rank {rank}": [
            Measure("share of the weights that is trained", trained / weights),
            Measure("checkpoint with adapters", small / _MEGABYTE, "MB"),
            Measure("checkpoint of all weights", whole / _MEGABYTE, "MB"),
            *(Measure(f"weight sync, {sync}", median(found[sync][0]), "s") for sync in ways),
            *(
                Measure(f"response tokens/s, {sync}", prompts * new_tokens / median(found[sync][1]), "tokens/s")
                for sync in ways
            ),
        ]
    }


def _counts(trainer: PolicyGroup) -> tuple[int, int]:
    """Parameters that are trained, and those that are not."""

    def counts(worker: PolicyWorker) -> tuple[int, int]:
        parameters = list(worker.engine.model.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        return trained, sum(parameter.numel() for parameter in parameters) - trained

    found: tuple[int, int] = ray.get(trainer.actors[0].__ray_call__.remote(counts), timeout=60)
    return found


def _checkpoint_bytes(trainer: PolicyGroup) -> int:
    with tempfile.TemporaryDirectory() as folder:
        trainer.save(Path(folder)).wait(Limit(300.0, "the limit in benchmarks/lora.py"))
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _measure(
    trainer: PolicyGroup, engines: RolloutGroup, batches: list[list[PromptRequest]], rollout: Rollout
) -> tuple[list[float], list[float]]:
    """Seconds of each sync, and of the generation after it; the first of both is the warm-up."""
    syncs, generations = [], []
    for version, batch in enumerate(batches, start=1):
        syncs.append(send_weights(trainer, version))
        began = perf_counter()
        for _ in engines.generate(cut_into_shards(batch, rollout.shard_samples), version):
            pass
        generations.append(perf_counter() - began)
        say(f"sync {syncs[-1]:.3f} s, generation {generations[-1]:.2f} s")
    return syncs[1:], generations[1:]


if __name__ == "__main__":
    run_benchmark(main)
