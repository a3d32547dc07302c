"""A rank of a model that is trained: policy, critic, reward model."""

import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from rlhf_ray.actors.device_means import MicroStats, StepNumbers
from rlhf_ray.actors.group import on_all
from rlhf_ray.actors.worker import RankGroup, Worker, load_rng, save_rng
from rlhf_ray.config.training import Critic, Policy, RewardModel
from rlhf_ray.engines.training import DTYPES, TrainingEngine, copy_to_host, full_adapter
from rlhf_ray.engines.weight_files import is_written_as_held, write_sharded
from rlhf_ray.models.heads import load_causal, load_scalar, load_tokenizer
from rlhf_ray.models.lora import ADAPTER_FOLDER, Adapter, has_adapters
from rlhf_ray.models.saving import save_model
from rlhf_ray.models.score_scale import ScoreScale, write_scale
from rlhf_ray.telemetry.metrics import Mean

Stats = dict[str, Mean]


class NonFiniteLossError(Exception):
    """A loss or gradient is NaN or infinite.

    Attributes:
        role: policy, critic or reward model.
        quantity: `loss` or `gradient norm`.
        value: what it was.
        samples: uids (with sample index) of the micro-batch or optimizer step that caused it.
    """

    def __init__(self, role: str, quantity: str, value: float, samples: Sequence[str]) -> None:
        self.role, self.quantity, self.value, self.samples = role, quantity, value, list(samples)
        super().__init__(
            f"{role}: {quantity} is {value}, caused by samples {', '.join(self.samples[:8])}"
            + (f" and {len(self.samples) - 8} more" if len(self.samples) > 8 else "")
            + ". Look at these samples' rewards and log-probs, lower the learning rate, or use float32; the last "
            "checkpoint is from before"
        )

    def __reduce__(self) -> tuple[type["NonFiniteLossError"], tuple[str, str, float, list[str]]]:
        return type(self), (self.role, self.quantity, self.value, self.samples)


@dataclass(frozen=True)
class UpdateReport:
    """What one rank's update was like. Means and samples of a rank that gives no results are empty.

    Attributes:
        means: to be added up over ranks.
        lr: of the last optimizer step.
        optimizer_steps: made.
        samples: trained on by this rank, each counted once an epoch.
        seconds: it took.
    """

    means: dict[str, Mean]
    lr: float
    optimizer_steps: int
    samples: int
    seconds: float


class TrainedWorker(Worker):
    """Holds a training engine; the roles add what they train on."""

    engine: TrainingEngine
    model_source: str
    trust_remote_code: bool
    _export: Future[None] | None = None

    def load_language_model(self, policy: Policy, total_steps: int, token_ids: int | None = None) -> None:
        """Load a causal model and build its training engine; collective. `token_ids` as in `load_causal`."""
        self.model_source, self.trust_remote_code = policy.model, policy.trust_remote_code
        model = load_causal(
            policy.model,
            dtype=DTYPES[policy.engine.dtype],
            vocab_chunk_tokens=policy.engine.vocab_chunk_tokens,
            trust_remote_code=policy.trust_remote_code,
            lora=policy.lora,
            sharded=policy.engine.zero_stage == 3,
            token_ids=token_ids,
        )
        self.engine = TrainingEngine(model, policy.engine, policy.optimizer, total_steps)

    def load_scalar_model(self, section: Critic | RewardModel, model: str, total_steps: int, seed: int) -> None:
        """Load a model with a scalar head, new ones by `seed`, and build its training engine; collective."""
        self.model_source, self.trust_remote_code = model, section.trust_remote_code
        loaded = load_scalar(
            model,
            dtype=DTYPES[section.engine.dtype],
            seed=seed,
            trust_remote_code=section.trust_remote_code,
            lora=section.lora,
            sharded=section.engine.zero_stage == 3,
        )
        self.engine = TrainingEngine(loaded, section.engine, section.optimizer, total_steps)

    def optimizer_step(
        self,
        micro_batches: Sequence[Sequence[int]],
        loss_of: Callable[[Sequence[int]], tuple[torch.Tensor, MicroStats]],
        names_of: Callable[[Sequence[int]], list[str]],
    ) -> tuple[list[float], Stats, float]:
        """One optimizer step on this rank's micro-batches of samples.

        Args:
            loss_of: a micro-batch's share of the loss, which adds up over micro-batches and ranks, and what to log.
            names_of: what errors call samples.

        Returns:
            The losses, the sums of what is logged, and the learning rate.

        Raises:
            NonFiniteLossError: before the optimizer step, or after one whose gradient is no number.
        """
        numbers = StepNumbers()
        for number, micro_batch in enumerate(micro_batches):
            loss, stats = loss_of(micro_batch)
            self.engine.backward(loss, last=number == len(micro_batches) - 1)
            numbers.add(stats, loss)
        losses, means = numbers.read()
        for value, micro_batch in zip(losses, micro_batches, strict=True):
            self.check_finite("loss", value, micro_batch, names_of)
        done = self.engine.step()
        everything = [sample for micro_batch in micro_batches for sample in micro_batch]
        self.check_finite("gradient norm", done.grad_norm, everything, names_of)
        return losses, means | {"grad_norm": Mean(done.grad_norm, 1.0)}, done.lr

    def save(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint."""
        with self.recorder.span("checkpoint"):
            folder.mkdir(parents=True, exist_ok=True)
            self.engine.save(folder)
            save_rng(folder / f"rng_rank{self.rank}.pt")

    def load(self, folder: Path) -> None:
        """Read this rank's part of a checkpoint."""
        with self.recorder.span("load checkpoint"):
            self.engine.load(folder)
            load_rng(folder / f"rng_rank{self.rank}.pt")

    def start_export(self, folder: Path, scale: ScoreScale | None = None) -> None:
        """Write the weights in Hugging Face format; collective, rank 0 writes.

        They are copied to host memory and written from a thread. Of a sharded model no rank has the room for all: its
        weights are written before this returns, a file at a time.

        Args:
            scale: of the scores, for the config.json of a reward model.
        """
        self.finish_export()
        writes, partial = self.rank == 0, folder.with_name(f"{folder.name}.partial")
        model = self.engine.model
        with self.recorder.span("export"):
            if writes:
                shutil.rmtree(partial, ignore_errors=True)
            weights = None
            if self.engine.sharded and is_written_as_held(model):
                write_sharded(model, partial if writes else None)
            else:
                weights = copy_to_host(model, keep=writes)
            adapter = full_adapter(model) if has_adapters(model) else None
        if writes:
            self._export = ThreadPoolExecutor(1).submit(self._write_export, partial, weights, adapter, scale, folder)

    def finish_export(self) -> None:
        """Wait for an export that is being written.

        Raises:
            Exception: what writing it raised.
        """
        export, self._export = self._export, None
        if export is not None:
            export.result()

    def _write_export(
        self,
        partial: Path,
        weights: dict[str, torch.Tensor] | None,
        adapter: Adapter | None,
        scale: ScoreScale | None,
        folder: Path,
    ) -> None:
        if weights is not None:  # else they are there
            save_model(self.engine.model.model, partial, weights)
        write_scale(partial, scale)
        if adapter is not None:
            adapter.write(partial / ADAPTER_FOLDER)
        load_tokenizer(self.model_source, trust_remote_code=self.trust_remote_code).save_pretrained(partial)
        previous = folder.with_name(folder.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        partial.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)

    def check_finite(
        self, quantity: str, value: float, samples: Sequence[int], names_of: Callable[[Sequence[int]], list[str]]
    ) -> None:
        """Raise `NonFiniteLossError` for NaN and infinity."""
        if not math.isfinite(value):
            raise NonFiniteLossError(self.role, quantity, value, names_of(samples))


TrainedT = TypeVar("TrainedT", bound=TrainedWorker)


class TrainedGroup(RankGroup[TrainedT]):
    """The ranks of a model that is trained."""

    save = on_all(TrainedWorker.save)
    load = on_all(TrainedWorker.load)
    start_export = on_all(TrainedWorker.start_export)
    finish_export = on_all(TrainedWorker.finish_export)


def sum_over_ranks(value: float, device: torch.device) -> float:
    """Sum of a number over the ranks of the role."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)
