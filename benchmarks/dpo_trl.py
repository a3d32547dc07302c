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

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

from benchmarks.bare_update import BareReport
from benchmarks.common import (
    RESULTS,
    ConfigArgument,
    FreshProcess,
    Machine,
    Measure,
    OverridesArgument,
    RepeatsOption,
    ResultsOption,
    process_env,
    report,
    run_command,
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
from rlhf_ray.controllers.preference_roles import PreferenceRoles, start_preference_roles
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
    results: ResultsOption = RESULTS,
) -> None:
    """Pairs/s of an optimizer step of DPO, ÷ those of TRL's trainer."""
    if find_spec("trl") is None:
        raise typer.BadParameter("TRL is not installed: run pip install -e '.[benchmarks]'", param_hint="CONFIG")
    arguments, machine = dict(locals()), Machine.here()
    job, data = _dpo(config, overrides or [])
    pairs = job.data.rows_per_step
    if pairs % trl_pairs:
        raise typer.BadParameter(f"{trl_pairs} does not divide data.rows_per_step ({pairs})", param_hint="--trl-pairs")
    dtype = job.policy.engine.dtype
    if trl_bfloat16_weights and dtype != "bfloat16":
        raise typer.BadParameter(f"policy.engine.dtype is {dtype}", param_hint="--trl-bfloat16-weights")
    threads = job.placement.policy.threads or max(1, int(job.placement.policy.cpus))
    turns = range(repeats + 1)  # the first is the warm-up
    with ray_session(job.cluster, "benchmark"), Actors.of_job(job) as actors:
        side = OurSide(job, data, start_preference_roles(job, len(turns), actors, with_reference=True))
        ours = [_told("ours", number, side.step()) for number in turns]
    with FreshProcess(process_env(threads)) as process:
        settings = TRLSettings(_beta(job.algorithm), trl_pairs, trl_bfloat16_weights, trl_attention, len(turns))
        process.call(_start_trl, threads, job.policy, settings, _token_ids(data))
        theirs = [_told("TRL", number, process.call(_step_trl)) for number in turns]
    seconds, seconds_trl = ([step.seconds for step in steps[1:]] for steps in (ours, theirs))
    rate, rate_trl = pairs / median(seconds), pairs / median(seconds_trl)
    packed, padded = _packed(job, data), _padded(data, trl_pairs)
    whole, answers = int(data.lengths.sum()), int(data.answer_lengths.sum())
    sizes = _sizes(job.policy.model)
    own = _products(sizes, packed, answers)
    report(
        "dpo_trl",
        ", ".join(
            [
                f"{config.name}, {dtype}",
                *(["TRL without float32 weights"] if trl_bfloat16_weights else []),
                *([f"TRL with {trl_attention} attention"] if trl_attention != "sdpa" else []),
            ]
        ),
        arguments,
        [
            Measure(name="DPO pairs/s ÷ TRL's DPOTrainer", value=rate / rate_trl, asked="at least 2"),
            Measure(name="the same of the fastest repetitions", value=min(seconds_trl) / min(seconds)),
            Measure(name="DPO", value=rate, unit="pairs/s"),
            Measure(name="TRL", value=rate_trl, unit="pairs/s"),
            Measure(name="pairs in one step", value=pairs),
            Measure(name="tokens in one step, of prompts and answers", value=whole),
            Measure(name="tokens in one step, of answers", value=answers),
            Measure(name="tokens in one step, packed with shared prompts", value=packed),
            Measure(name="tokens in one step, with TRL's padding", value=padded),
            *(
                Measure(
                    name=f"products with weights, TRL ÷ ours, counted{where}", value=_products(sizes, *tokens) / own
                )
                for where, tokens in (
                    ("", (padded, padded)),
                    (", where TRL's head takes answers only, as on a GPU", (padded, answers)),
                    (", and with its padding_free too", (whole, answers)),
                )
            ),
            Measure(
                name="relative difference of the gradient norms",
                value=abs(ours[-1].grad_norm / theirs[-1].grad_norm - 1),
            ),
            spread(seconds, seconds_trl),
        ],
        machine,
        results,
    )


def _told(side: str, number: int, step: BareReport) -> BareReport:
    say(f"{side} {number}: {step.seconds:.3f} s")
    return step


def _dpo(config: Path, overrides: Sequence[str]) -> tuple[PreferenceJob, ComparisonSet]:
    """The job with one rank and a low learning rate, and the pairs of its first step."""
    still = ("placement.policy.ranks=1", "policy.optimizer.lr=1e-8", "policy.optimizer.warmup_steps=0")
    job = choose_before_start(load_config(config, [*overrides, *still, "policy.optimizer.schedule=constant"])).config
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


class OurSide:
    """A step of the job on all pairs, as the controller does it."""

    def __init__(self, job: PreferenceJob, data: ComparisonSet, roles: PreferenceRoles) -> None:
        reference = LiveReference.with_roles(job, roles)
        assert reference is not None
        self._job, self._policy, self._reference = job, roles.policy, reference
        self._split = Split("train", data)
        self._rows = np.arange(len(data))

    def step(self) -> BareReport:
        began = perf_counter()
        data = self._split.rows
        [plan] = plan_micro_batches(data.lengths, 1, self._job.policy.engine.micro_batch_tokens)
        context = StepContext(reference=self._reference.of(self._split, self._rows))
        weight = float(data.weights.sum())
        [done] = self._policy.step([(self._split.ref, plan)], weight, context).wait(self._job.run.timeouts.update)
        return BareReport(done.means["grad_norm"].value, perf_counter() - began)


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


@dataclass(frozen=True)
class TRLSettings:
    """What TRL's trainer is told beside the policy's section.

    Attributes:
        pairs_per_pass: divides the number of pairs.
        bfloat16_weights: have no float32 weights beside.
        attention: as transformers names it.
        steps: optimizer steps of the run.
    """

    beta: float
    pairs_per_pass: int
    bfloat16_weights: bool
    attention: str
    steps: int


class TRLSide:
    """TRL's trainer in a thread of its own, which stops before each optimizer step until it is asked for it."""

    def __init__(self, policy: Policy, settings: TRLSettings, rows: Sequence[PairTokens]) -> None:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
        from trl import DPOConfig, DPOTrainer

        side = self
        self._ask, self._answers = threading.Semaphore(0), SimpleQueue[BareReport | Exception]()

        class OnTokens(DPOTrainer):
            """The pairs are tokens already."""

            def _prepare_dataset(self, dataset: Dataset, *rest: Any) -> Dataset:
                return dataset

        class InTurns(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                side._ask.acquire()
                self._began = perf_counter()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                self._seconds = perf_counter() - self._began

            def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
                if "grad_norm" in logs:  # and not the summary of the run
                    side._answers.put(BareReport(float(logs["grad_norm"]), self._seconds))

        def load() -> Any:
            return AutoModelForCausalLM.from_pretrained(
                policy.model,
                dtype=torch.bfloat16 if settings.bfloat16_weights else torch.float32,
                attn_implementation=settings.attention,
            )

        self._scratch = TemporaryDirectory()
        optimizer = policy.optimizer
        self._trainer = OnTokens(
            model=load(),
            ref_model=load(),
            args=DPOConfig(
                output_dir=self._scratch.name,
                beta=settings.beta,
                max_steps=settings.steps,
                per_device_train_batch_size=settings.pairs_per_pass,
                gradient_accumulation_steps=len(rows) // settings.pairs_per_pass,
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
                bf16=policy.engine.dtype == "bfloat16" and not settings.bfloat16_weights,
                use_cpu=platform().device.type == "cpu",
                dataloader_pin_memory=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([vars(row) for row in rows] * settings.steps),
            processing_class=AutoTokenizer.from_pretrained(policy.model),
            callbacks=[InTurns()],
        )
        self._trainer.remove_callback(PrinterCallback)
        threading.Thread(target=self._train, daemon=True).start()

    def _train(self) -> None:
        try:
            self._trainer.train()
        except Exception as error:
            self._answers.put(error)

    def step(self) -> BareReport:
        self._ask.release()
        done = self._answers.get()
        if isinstance(done, Exception):
            raise done
        return done


_trl: TRLSide


def _start_trl(threads: int, *arguments: Any) -> None:
    """`arguments` are TRLSide's."""
    global _trl
    torch.set_num_threads(threads)
    _trl = TRLSide(*arguments)


def _step_trl() -> BareReport:
    return _trl.step()


if __name__ == "__main__":
    run_command(main)
