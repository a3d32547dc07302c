"""A rank of a model that is trained: policy, critic, reward model."""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from rlhf_ray.actors.group import Calls
from rlhf_ray.actors.worker import RankGroup, Worker, load_rng, save_rng
from rlhf_ray.config.training import Policy
from rlhf_ray.engines.training import DTYPES, TrainingEngine, full_adapter, full_weights
from rlhf_ray.engines.weight_files import is_written_as_held, write_sharded
from rlhf_ray.models.heads import load_causal, load_tokenizer
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

    def save(self, folder: str) -> None:
        """Write this rank's part of a checkpoint."""
        with self.recorder.span("checkpoint"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.engine.save(Path(folder))
            save_rng(Path(folder) / f"rng_rank{self.rank}.pt")

    def load(self, folder: str) -> None:
        """Read this rank's part of a checkpoint."""
        with self.recorder.span("load checkpoint"):
            self.engine.load(Path(folder))
            load_rng(Path(folder) / f"rng_rank{self.rank}.pt")

    def start_export(self, folder: str, scale: ScoreScale | None = None) -> None:
        """Write the weights in Hugging Face format; collective, rank 0 writes.

        They are copied to host memory and written from a thread. Of a sharded model no rank has the room for all: its
        weights are written before this returns, a file at a time.

        Args:
            scale: of the scores, for the config.json of a reward model.
        """
        self.finish_export()
        writes, partial = self.rank == 0, Path(f"{folder}.partial")
        model = self.engine.model
        with self.recorder.span("export"):
            if writes:
                shutil.rmtree(partial, ignore_errors=True)
            weights = None
            if self.engine.sharded and is_written_as_held(model):
                write_sharded(model, partial if writes else None)
            else:
                weights = _host_copy(model, keep=writes)
            adapter = full_adapter(model) if has_adapters(model) else None
        if writes:
            arguments = (partial, weights, adapter, scale, Path(folder))
            self._export = threading.Thread(target=self._write_export, args=arguments, daemon=True)
            self._export_error: Exception | None = None
            self._export.start()

    def finish_export(self) -> None:
        """Wait for an export that is being written.

        Raises:
            Exception: what writing it raised.
        """
        thread: threading.Thread | None = getattr(self, "_export", None)
        if thread is None:
            return
        thread.join()
        del self._export
        if self._export_error is not None:
            raise self._export_error

    def _write_export(
        self,
        partial: Path,
        weights: dict[str, torch.Tensor] | None,
        adapter: Adapter | None,
        scale: ScoreScale | None,
        folder: Path,
    ) -> None:
        try:
            if weights is not None:  # else they are there
                save_model(self.engine.model.model, partial, weights)
            write_scale(partial, scale)
            if adapter is not None:
                adapter.write(partial / ADAPTER_FOLDER)
            load_tokenizer(self.model_source, trust_remote_code=self.trust_remote_code).save_pretrained(partial)
            self.finish_export_folder(partial)
            previous = folder.with_name(folder.name + ".previous")
            shutil.rmtree(previous, ignore_errors=True)
            if folder.exists():
                folder.rename(previous)
            partial.rename(folder)
            shutil.rmtree(previous, ignore_errors=True)
        except Exception as error:  # raised again by finish_export, in the caller's thread
            self._export_error = error

    def finish_export_folder(self, folder: Path) -> None:
        """Add what a role's export has beside model and tokenizer."""

    def check_finite(self, quantity: str, value: float, samples: Callable[[], Sequence[str]]) -> None:
        """Raise `NonFiniteLossError` for NaN and infinity."""
        if value != value or value in (float("inf"), float("-inf")):
            raise NonFiniteLossError(self.role, quantity, value, samples())


TrainedT = TypeVar("TrainedT", bound=TrainedWorker)


class TrainedGroup(RankGroup[TrainedT]):
    """The ranks of a model that is trained."""

    def save(self, folder: Path) -> Calls[None]:
        """Have every rank write its part of a checkpoint."""
        return self.call(TrainedWorker.save, str(folder))

    def load(self, folder: Path) -> Calls[None]:
        """Have every rank read its part of a checkpoint."""
        return self.call(TrainedWorker.load, str(folder))

    def start_export(self, folder: Path, scale: ScoreScale | None) -> Calls[None]:
        """Have the weights copied, and written in the background."""
        return self.call(TrainedWorker.start_export, str(folder), scale)

    def finish_export(self) -> Calls[None]:
        """Wait until they are written."""
        return self.call(TrainedWorker.finish_export)


def sum_over_ranks(value: float, device: torch.device) -> float:
    """Sum of a number over the ranks of the role."""
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._began


def _host_copy(model: nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    copies = {}
    for name, tensor in full_weights(model, bucket_bytes=256 * 2**20):
        if keep:
            copies[name] = tensor.detach().to("cpu", copy=True)
    return copies
