"""Pairs/s of a DPO job against TRL's: `python -m benchmarks.dpo_trl CONFIG`, with the extra `benchmarks`.

Ours is a step of a preference job as its controller calls it: log-probs of the reference's actor, then `step` of the
policy's. TRL's is an optimizer step of its `DPOTrainer` on the same pairs of tokens in the same order, with the same
optimizer and both models in memory. One side comes after the other, since both at once fill 24 GB. The learning rate is
so low that every repetition does the same; that the gradient norms agree shows that it is the same on both sides.

TRL has transformers' own choice of attention, PyTorch's fused kernel, no gradient checkpointing, and micro-batches that
are collated before its clock starts. `--trl-pairs` sets their size: more pairs are more padding, fewer are more passes.
With `--trl-attention eager` it has all scores in memory, which can be faster on a CPU as long as they are few. A job in
bfloat16 computes in it and updates float32 weights, and so does TRL, by autocast, unless it is told otherwise.
`--trl-bfloat16-weights` tells it otherwise: faster, and an update that is small beside its weight is lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

from benchmarks.bare_update import BareReport
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
from rlhf_ray.actors.preference import StepContext
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config.jobs import PreferenceJob
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.preference import Preference, SigmoidLoss
from rlhf_ray.config.training import Policy
from rlhf_ray.controllers.inputs import PreferenceInputs
from rlhf_ray.controllers.job import check
from rlhf_ray.controllers.number_formats import choose_before_start
from rlhf_ray.controllers.preference_roles import start_preference_roles
from rlhf_ray.controllers.reference_columns import LiveReference
from rlhf_ray.controllers.roles import Actors
from rlhf_ray.controllers.row_sources import Split
from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.data.packing import plan_micro_batches
from rlhf_ray.models.answers import AnswerPack
from rlhf_ray.models.heads import empty_model
from rlhf_ray.platform import platform


def main(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    trl_pairs: Annotated[int, typer.Option(min=1, help="Pairs of TRL's forward pass; divides rows_per_step.")] = 2,
    trl_bfloat16_weights: Annotated[
        bool, typer.Option("--trl-bfloat16-weights", help="TRL without float32 weights.")
    ] = False,
    trl_attention: Annotated[Literal["sdpa", "eager"], typer.Option(help="TRL's, as transformers names it.")] = "sdpa",
    repeats: RepeatsOption = 3,
) -> Findings:
    """Pairs/s of an optimizer step of DPO, ÷ those of TRL's trainer."""
    if find_spec("trl") is None:
        raise typer.BadParameter("TRL is not installed: run pip install -e '.[benchmarks]'", param_hint="CONFIG")
    job, data = _dpo(config, overrides or [])
    pairs = job.data.rows_per_step
    if pairs % trl_pairs:
        raise typer.BadParameter(f"{trl_pairs} does not divide data.rows_per_step ({pairs})", param_hint="--trl-pairs")
    dtype = job.policy.engine.dtype
    if trl_bfloat16_weights and dtype != "bfloat16":
        raise typer.BadParameter(f"policy.engine.dtype is {dtype}", param_hint="--trl-bfloat16-weights")
    threads = job.placement.policy.threads or max(1, int(job.placement.policy.cpus))
    steps = repeats + 1  # the first is the warm-up
    ours = _our_steps(job, data, steps)
    with FreshProcess(threads) as process:
        trl_steps = partial(
            _trl_steps,
            beta=_beta(job.algorithm),
            pairs_per_pass=trl_pairs,
            bfloat16_weights=trl_bfloat16_weights,
            attention=trl_attention,
        )
        theirs = process.call(trl_steps, job.policy, _token_ids(data), steps)
    seconds, seconds_trl = ([step.seconds for step in side[1:]] for side in (ours, theirs))
    rate, rate_trl = pairs / median(seconds), pairs / median(seconds_trl)
    packed, padded = _packed(job, data), _padded(data, trl_pairs)
    whole, answers = int(data.lengths.sum()), int(data.answer_lengths.sum())
    sizes = _sizes(job.policy.model)
    own = _products(sizes, packed, answers)
    return {
        ", ".join(
            [
                f"{config.name}, {dtype}",
                *(["TRL without float32 weights"] if trl_bfloat16_weights else []),
                *([f"TRL with {trl_attention} attention"] if trl_attention != "sdpa" else []),
            ]
        ): [
            Measure("DPO pairs/s ÷ TRL's DPOTrainer", rate / rate_trl, asked="at least 2"),
            Measure("the same of the fastest repetitions", min(seconds_trl) / min(seconds)),
            Measure("DPO", rate, "pairs/s"),
            Measure("TRL", rate_trl, "pairs/s"),
            Measure("pairs in one step", pairs),
            Measure("tokens in one step, of prompts and answers", whole),
            Measure("tokens in one step, of answers", answers),
            Measure("tokens in one step, packed with shared prompts", packed),
            Measure("tokens in one step, with TRL's padding", padded),
            *(
                Measure(f"products with weights, TRL ÷ ours, counted{where}", _products(sizes, *tokens) / own)
                for where, tokens in (
                    ("", (padded, padded)),
                    (", where TRL's head takes answers only, as on a GPU", (padded, answers)),
                    (", and with its padding_free too", (whole, answers)),
                )
            ),
            Measure("relative difference of the gradient norms", abs(ours[-1].grad_norm / theirs[-1].grad_norm - 1)),
            spread(seconds, seconds_trl),
        ]
    }


def _dpo(config: Path, overrides: Sequence[str]) -> tuple[PreferenceJob, ComparisonSet]:
    """The job with one rank and a low learning rate, and the pairs of its first step."""
    still = (
        "placement.policy.ranks=1",
        "policy.optimizer.lr=1e-8",
        "policy.optimizer.warmup_steps=0",
        "policy.optimizer.schedule=constant",
        "run.resume=never",  # a run in its folder may have been of another number format
    )
    job = choose_before_start(load_config(config, [*overrides, *still])).config
    if not isinstance(job, PreferenceJob):
        raise typer.BadParameter(f"job: {job.job} is not job: preference", param_hint="CONFIG")
    _beta(job.algorithm)
    if job.reference.from_model != "policy" or job.reference.cache is not None or job.policy.lora is not None:
        raise typer.BadParameter(
            "reference.from, reference.cache and policy.lora must be their defaults", param_hint="CONFIG"
        )
    inputs = check(job)
    assert isinstance(inputs, PreferenceInputs)
    assert isinstance(inputs.train, ComparisonSet)
    if len(inputs.train) < job.data.rows_per_step:
        raise typer.BadParameter(
            f"data.train has {len(inputs.train)} rows that fit, less than data.rows_per_step", param_hint="CONFIG"
        )
    return job, inputs.train.first(job.data.rows_per_step)


def _beta(algorithm: Preference) -> float:
    """Of plain DPO; anything else is refused."""
    loss = algorithm.loss[0]
    if not isinstance(loss, SigmoidLoss) or algorithm != Preference(
        loss=(SigmoidLoss(type="sigmoid", beta=loss.beta),)
    ):
        raise typer.BadParameter("algorithm must be plain DPO: one sigmoid loss", param_hint="CONFIG")
    return loss.beta


def _our_steps(job: PreferenceJob, data: ComparisonSet, steps: int) -> list[BareReport]:
    """Steps of the job on all pairs, as the controller does them."""
    rows, found = np.arange(len(data)), []
    with ray_session(job.cluster, "benchmark"), Actors.of_job(job) as actors:
        roles = start_preference_roles(job, steps, actors, with_reference=True)
        reference = LiveReference.with_roles(job, roles)
        assert reference is not None
        split = Split("train", data)
        for number in range(steps):
            began = perf_counter()
            [plan] = plan_micro_batches(data.lengths, 1, job.policy.engine.micro_batch_tokens)
            context = StepContext(reference=reference.of(split, rows))
            weight = float(data.weights.sum())
            [done] = roles.policy.step([(split.ref, plan)], weight, context).wait(job.run.timeouts.update)
            found.append(BareReport(done.means["grad_norm"].value, perf_counter() - began))
            say(f"ours {number}: {found[-1].seconds:.3f} s")
    return found


@dataclass(frozen=True)
class PairTokens:
    """Token ids of one pair."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def _token_ids(data: ComparisonSet) -> list[PairTokens]:
    found = []
    for row in range(len(data)):
        first, second = data.candidates([row]).tolist()
        chosen, rejected = (first, second) if data.ranks[first] < data.ranks[second] else (second, first)
        prompt = int(data.answer_starts[chosen])
        good, bad = data.tokens(chosen).tolist(), data.tokens(rejected).tolist()
        found.append(PairTokens(good[:prompt], good[prompt:], bad[prompt:]))
    return found


def _packed(job: PreferenceJob, data: ComparisonSet) -> int:
    [plan] = plan_micro_batches(data.lengths, 1, job.policy.engine.micro_batch_tokens)
    packs = (AnswerPack.of(data, data.candidates(rows).tolist(), torch.device("cpu")) for rows in plan)
    return sum(pack.packed.input_ids.shape[1] for pack in packs)


def _sizes(model: str) -> tuple[int, int]:
    """Weights of a model's layers, and of its vocabulary head."""
    empty = empty_model(model, scalar=False, dtype=torch.float32)
    body = sum(parameter.numel() for parameter in empty.base_model.parameters())
    return body - empty.get_input_embeddings().weight.numel(), empty.get_output_embeddings().weight.numel()


def _products(sizes: tuple[int, int], in_layers: int, in_head: int) -> int:
    """Products of a weight with a token's number in a step: the reference forward, the policy forward and backward.

    The backward pass has two for each of the forward pass. Both sides make the logits of the policy twice.
    """
    layers, head = sizes
    return 4 * layers * in_layers + 5 * head * in_head


def _padded(data: ComparisonSet, pairs: int) -> int:
    lengths = np.diff(data.token_offsets).reshape(-1, pairs * 2)
    return int((lengths.max(axis=1) * pairs * 2).sum())


def _trl_steps(
    policy: Policy,
    rows: Sequence[PairTokens],
    steps: int,
    *,
    beta: float,
    pairs_per_pass: int,
    bfloat16_weights: bool,
    attention: str,
) -> list[BareReport]:
    """Optimizer steps of TRL's trainer on all pairs.

    Args:
        pairs_per_pass: divides the number of pairs.
        bfloat16_weights: have no float32 weights beside.
        attention: as transformers names it.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    found: list[BareReport] = []

    class OnTokens(DPOTrainer):
        """The pairs are tokens already."""

        def _prepare_dataset(self, dataset: Dataset, *rest: Any) -> Dataset:
            return dataset

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self._began = perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self._seconds = perf_counter() - self._began

        def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            if "grad_norm" in logs:  # and not the summary of the run
                say(f"TRL {len(found)}: {self._seconds:.3f} s")
                found.append(BareReport(float(logs["grad_norm"]), self._seconds))

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            policy.model,
            dtype=torch.bfloat16 if bfloat16_weights else torch.float32,
            attn_implementation=attention,
        )

    optimizer = policy.optimizer
    with TemporaryDirectory() as scratch:
        trainer = OnTokens(
            model=load(),
            ref_model=load(),
            args=DPOConfig(
                output_dir=scratch,
                beta=beta,
                max_steps=steps,
                per_device_train_batch_size=pairs_per_pass,
                gradient_accumulation_steps=len(rows) // pairs_per_pass,
                train_sampling_strategy="sequential",
                max_length=None,
                optim="adamw_torch_fused",
                learning_rate=optimizer.lr,
                adam_beta1=optimizer.betas[0],
                adam_beta2=optimizer.betas[1],
                adam_epsilon=optimizer.eps,
                weight_decay=optimizer.weight_decay,
                max_grad_norm=policy.engine.gradient_clip,
                lr_scheduler_type="constant",
                gradient_checkpointing=False,
                bf16=policy.engine.dtype == "bfloat16" and not bfloat16_weights,
                use_cpu=platform().device.type == "cpu",
                dataloader_pin_memory=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([vars(row) for row in rows] * steps),
            processing_class=AutoTokenizer.from_pretrained(policy.model),
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return found


if __name__ == "__main__":
    run_benchmark(main)
