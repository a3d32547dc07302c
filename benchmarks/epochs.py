"""Training tokens/s of a fine-tuning or reward-model job, against plain torch: `python -m benchmarks.epochs CONFIG`.

Ours is the `step` of the job's actor, called as its controller calls it, on the first rows of the job's data. Bare is a
loop in plain torch over the same packed micro-batches, which are ready before its clock starts. Both live side by side
and take turns. The learning rate is so low that every repetition does the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import ray
import torch
import torch.nn.functional as F
import typer

from benchmarks.bare_update import BareModel, BareReport, hidden_states
from benchmarks.common import (
    ConfigArgument,
    Findings,
    FreshProcess,
    Measure,
    OverridesArgument,
    RepeatsOption,
    run_benchmark,
    say,
    spread,
)
from rlhf_ray.actors.reward_training import RewardTrainingGroup
from rlhf_ray.actors.sft import SFTGroup, pack_learnt
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config.jobs import RewardModelJob, SFTJob
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.reward_loss import BradleyTerry
from rlhf_ray.config.training import Optimizer, TrainingEngine
from rlhf_ray.controllers.epoch_jobs import start_reward_training, start_sft
from rlhf_ray.controllers.inputs import EpochInputs, RowSet
from rlhf_ray.controllers.job import check
from rlhf_ray.controllers.number_formats import choose_before_start
from rlhf_ray.controllers.roles import Actors
from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.data.conversations import ConversationSet
from rlhf_ray.data.packing import plan_micro_batches
from rlhf_ray.data.streaming import ConversationStream
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.platform import platform


def main(config: ConfigArgument, overrides: OverridesArgument = None, repeats: RepeatsOption = 5) -> Findings:
    """Tokens/s of an optimizer step, as a share of a bare torch loop's."""
    job, train, micro_batches = _first_step(config, overrides or [])
    role, section = job.trained, job.section
    rows = [row for micro_batch in micro_batches for row in micro_batch]
    tokens, weight = int(train.lengths[rows].sum()), int(train.weights[rows].sum())
    assert role.placement is not None
    threads = role.placement.threads or max(1, int(role.placement.cpus))
    ours: list[float] = []
    bare: list[float] = []
    with (
        ray_session(job.cluster, "benchmark"),
        _trained_role(job, repeats + 1) as group,
        FreshProcess(threads) as process,
    ):
        process.make(
            _BareLoop,
            job.seed if isinstance(job, RewardModelJob) else None,
            section.model,
            section.engine,
            section.optimizer,
            train,
            micro_batches,
            weight,
        )
        data = [ray.put(train)]
        for number in range(repeats + 1):  # the first is the warm-up
            began = perf_counter()
            [done] = group.step([(data, micro_batches)], weight, None).wait(job.run.timeouts.update)
            ours.append(perf_counter() - began)
            reference = process.ask(_BareLoop.step)
            bare.append(reference.seconds)
            say(f"{number}/{repeats}: ours {ours[-1]:.3f} s, bare {reference.seconds:.3f} s")
    rate, rate_bare = (tokens / median(seconds[1:]) for seconds in (ours, bare))
    return {
        f"{config.name}, {section.engine.dtype}": [
            Measure(f"{job.job} tokens/s ÷ bare torch", rate / rate_bare, asked="at least 0.90"),
            Measure(job.job, rate, "tokens/s"),
            Measure("bare torch", rate_bare, "tokens/s"),
            Measure("tokens in one step", tokens),
            Measure("micro-batches in one step", len(micro_batches)),
            Measure(
                "relative difference of the gradient norms",
                abs(done.means["grad_norm"].value / reference.grad_norm - 1),
            ),
            spread(ours[1:], bare[1:]),
        ]
    }


@contextmanager
def _trained_role(job: SFTJob | RewardModelJob, steps: int) -> Iterator[SFTGroup | RewardTrainingGroup]:
    """The ranks of the job's model, ready to train."""
    with Actors.of_job(job) as actors:
        if isinstance(job, SFTJob):
            yield start_sft(job, steps, actors)
        else:
            yield start_reward_training(job, steps, actors)


def _first_step(config: Path, overrides: Sequence[str]) -> tuple[SFTJob | RewardModelJob, RowSet, list[list[int]]]:
    """The job with one rank and a low learning rate, its data, and the micro-batches of its first rows."""
    job = load_config(config, overrides)
    if not isinstance(job, SFTJob | RewardModelJob):
        raise typer.BadParameter("job must be sft or reward_model", param_hint="CONFIG")
    if isinstance(job, RewardModelJob) and job.loss != BradleyTerry(type="bradley_terry"):
        raise typer.BadParameter("the bare loop knows plain Bradley–Terry only", param_hint="CONFIG")
    name = job.trained.name
    still = (
        f"placement.{name}.ranks=1",
        f"{name}.optimizer.lr=1e-8",
        f"{name}.optimizer.warmup_steps=0",
        "run.resume=never",  # a run in its folder may have been of another number format
    )
    job = choose_before_start(load_config(config, [*overrides, *still])).config
    assert isinstance(job, SFTJob | RewardModelJob)
    inputs = check(job)
    assert isinstance(inputs, EpochInputs)
    assert not isinstance(inputs.train, ConversationStream)
    lengths = inputs.train.lengths[: job.rows_per_step]
    [plan] = plan_micro_batches(lengths, 1, job.section.engine.micro_batch_tokens)
    return job, inputs.train, plan


@dataclass(frozen=True)
class _MicroBatch:
    """A pack, the places that are looked at (those before learnt tokens, or ends of texts), and the learnt tokens."""

    packed: PackedSequences
    positions: torch.Tensor
    targets: torch.Tensor


class _BareLoop:
    def __init__(
        self,
        scalar_seed: int | None,
        model: str,
        engine: TrainingEngine,
        optimizer: Optimizer,
        data: ComparisonSet | ConversationSet,
        micro_batches: Sequence[Sequence[int]],
        weight: float,
    ) -> None:
        self._scalar, self._weight = scalar_seed is not None, weight
        self._bare = BareModel(model, engine, optimizer, scalar_seed=scalar_seed)
        self._micro_batches = [_pack(data, rows) for rows in micro_batches]

    def step(self) -> BareReport:
        began = perf_counter()
        for micro_batch in self._micro_batches:
            (self._loss(micro_batch) / self._weight).backward()
        norm = self._bare.step()
        return BareReport(norm, perf_counter() - began)

    def _loss(self, micro_batch: _MicroBatch) -> torch.Tensor:
        model = self._bare.model
        hidden = hidden_states(model, micro_batch.packed)[micro_batch.positions]
        if self._scalar:
            chosen, rejected = model.score(hidden)[:, 0].float().unflatten(0, (-1, 2)).unbind(1)
            return -F.logsigmoid(chosen - rejected).sum()
        logits = model.get_output_embeddings()(hidden).float()
        return -logits.log_softmax(-1).gather(-1, micro_batch.targets[:, None]).sum()


def _pack(data: ComparisonSet | ConversationSet, rows: Sequence[int]) -> _MicroBatch:
    device = platform().device
    if isinstance(data, ComparisonSet):
        packed = PackedSequences.of([data.tokens(candidate) for candidate in data.candidates(rows)], device)
        return _MicroBatch(packed, packed.cu_seqlens[1:].long() - 1, torch.empty(0))
    return _MicroBatch(*pack_learnt(data, rows, device))


if __name__ == "__main__":
    run_benchmark(main)
