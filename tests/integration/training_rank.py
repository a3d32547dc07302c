"""A rank that trains a tiny model on given sequences, with the training engine of the package."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from torch.multiprocessing.reductions import StorageWeakRef

from rlhf_ray.actors.watched import actor_class
from rlhf_ray.actors.worker import RankGroup, Worker, join_collectives_of
from rlhf_ray.config.roles import Level
from rlhf_ray.config.run import Limit, Timeouts
from rlhf_ray.config.training import Lora, Optimizer, ScoringEngine, TrainingEngine
from rlhf_ray.engines.device_states import frozen_tensors
from rlhf_ray.engines.host_copies import HostCopies
from rlhf_ray.engines.presence import NotOnDeviceError
from rlhf_ray.engines.training import DTYPES, ForwardEngine, full_weights
from rlhf_ray.engines.training import TrainingEngine as Engine
from rlhf_ray.engines.weight_files import write_sharded
from rlhf_ray.models.heads import load_causal, load_scalar
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.models.role_models import CausalModel, ScalarModel

Weights = dict[str, np.ndarray]
R = TypeVar("R")

SEQUENCES = [np.random.default_rng(0).integers(3, 512, n).astype(np.int32) for n in (5, 9, 17, 32, 9, 11, 12, 30)]
PREDICTED = sum(len(tokens) - 1 for tokens in SEQUENCES)
# With the usual eps the first step of a weight whose gradient is nearly 0 is the sign of its rounding error.
OPTIMIZER = Optimizer(lr=1e-3, eps=1e-5, warmup_steps=1, schedule="linear", weight_decay=0.01)
TOTAL_STEPS = 5
LORA_SEED = 5
HEAD_SEED = 7

# What is freed goes back to the system at once, so memory in use is what tensors take.
ENV = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)}
BUILD_S = 400  # DeepSpeed compiles its operators at first use: a minute each on two free cores


@dataclass
class Trained:
    """What training gave.

    Attributes:
        gradients: full gradient after the last backward pass of each step.
        norms: gradient norm that each step reported.
        rates: learning rate of each step.
        weights: after the last step.
    """

    gradients: list[Weights] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    weights: Weights = field(default_factory=dict)


def outputs(model: Any, sequences: list[int], *, scalar: bool = False) -> torch.Tensor:
    """What a model says at all places of some sequences but their last: values, or log-probs and entropies."""
    packed = PackedSequences.of(
        [SEQUENCES[number] for number in sequences] or [np.zeros(1, np.int32)], torch.device("cpu")
    )
    predicts = torch.ones(packed.input_ids.shape[1], dtype=torch.bool)
    predicts[packed.cu_seqlens[1:].long() - 1] = False
    positions = predicts.nonzero()[:, 0]
    if scalar:
        values: torch.Tensor = model(packed, positions)
        return values
    return torch.stack(model(packed, positions, packed.input_ids[0][positions + 1], 1.0))


def token_mean_loss(model: Any, sequences: list[int], *, scalar: bool = False) -> torch.Tensor:
    """These sequences' share of the mean over all tokens: squared value, or negative log-prob and a little entropy."""
    out = outputs(model, sequences, scalar=scalar)
    if scalar:
        return (out - 1.0).square().sum() / PREDICTED
    return -(out[0].sum() + 0.01 * out[1].sum()) / PREDICTED


def load(
    folder: str, dtype: torch.dtype, *, scalar: bool, sharded: bool = False, lora: Lora | None = None
) -> CausalModel | ScalarModel:
    """A model of either kind."""
    if scalar:
        return load_scalar(folder, dtype=dtype, seed=HEAD_SEED, lora=lora, sharded=sharded)
    return load_causal(folder, dtype=dtype, vocab_chunk_tokens=16, lora=lora, sharded=sharded)


class TrainingRank(Worker):
    """One rank; it can build one engine after the other."""

    def build(
        self,
        model: str,
        config: TrainingEngine,
        lora: Lora | None = None,
        scalar: bool = False,
        sharded: bool | None = None,
    ) -> None:
        """A new engine around a new model; with `sharded` each rank reads its part, which is the default of stage 3."""
        torch.manual_seed(LORA_SEED + self.rank)  # rank 0's adapters are all ranks'
        sharded = config.zero_stage == 3 if sharded is None else sharded
        self.scalar = scalar
        self.model = load(model, DTYPES[config.dtype], scalar=scalar, lora=lora, sharded=sharded)
        self.engine = Engine(self.model, config, OPTIMIZER, TOTAL_STEPS)

    def train(self, steps: int, micro_batches: list[list[int]], moves: Sequence[Level] = ()) -> Trained:
        """Optimizer steps, each on these micro-batches of this rank, leaving the device and coming back in between."""
        found = Trained()
        if moves:
            self.engine._states._host = HostCopies(apart=True)  # copies are made as where a device has its own memory
        for _ in range(steps):
            for level in moves:
                self.engine.move(level)
                if level == Level.WEIGHTS:
                    with torch.no_grad():
                        token_mean_loss(self.engine, micro_batches[0])
            for number, micro_batch in enumerate(micro_batches):
                loss = token_mean_loss(self.engine, micro_batch, scalar=self.scalar)
                self.engine.backward(loss, last=number == len(micro_batches) - 1)
            gradients = {
                name: safe_get_full_grad(p) for name, p in self.model.model.named_parameters() if p.requires_grad
            }
            found.gradients.append({name: gradient.float().numpy().copy() for name, gradient in gradients.items()})
            stats = self.engine.step()
            found.norms.append(stats.grad_norm)
            found.rates.append(stats.lr)
        found.weights = self.weights()
        return found

    def left_behind(self) -> dict[str, tuple[int, int]]:
        """Bytes of frozen weights, shards and optimizer state that are alive after the engine has left, and of all."""
        states, optimizer = self.engine._states, self.engine._engine.optimizer
        states._host = HostCopies(apart=True)
        tensors = {"frozen": list(frozen_tensors(self.model))}
        if states._sharded:
            tensors |= {"shards": [optimizer.lp_param_buffer], "optimizer": list(states._optimizer_tensors())}
        storages = {name: [tensor.untyped_storage() for tensor in found] for name, found in tensors.items()}
        watched = {name: [(StorageWeakRef(s), s.nbytes()) for s in found] for name, found in storages.items()}
        del tensors, storages
        self.engine.move(Level.OUT)
        gc.collect()
        return {
            name: (sum(size for ref, size in found if not ref.expired()), sum(size for _, size in found))
            for name, found in watched.items()
        }

    def try_to_work(self, level: Level) -> list[str]:
        """What the engine says when it is to work while it is elsewhere."""
        self.engine.move(level)
        said = []
        for work in (
            lambda: token_mean_loss(self.engine, [0]),
            lambda: self.engine.backward(torch.zeros((), requires_grad=True), last=True),
            self.engine.step,
        ):
            try:
                work()
                said.append("")
            except NotOnDeviceError as error:
                said.append(str(error))
        return said

    def peak_memory(self, tokens: int) -> int:
        """Bytes that forward and backward pass of one sequence take at most, beside weights and gradients."""
        for number, length in enumerate((64, tokens)):  # what the first pass allocates stays
            text = np.random.default_rng(0).integers(3, 512, length).astype(np.int32)
            packed = PackedSequences.of([text], torch.device("cpu"))
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = _status("VmRSS")
            logprobs, _ = self.engine(packed, torch.arange(length - 1), packed.input_ids[0, 1:], 1.0, "nothing")
            self.engine.backward(logprobs.mean(), last=number == 1)
        self.engine.step()
        return _status("VmHWM") - before

    def weights(self, bucket_bytes: int = 20_000) -> Weights:
        """Whole tensors as `full_weights` yields them."""
        return {name: tensor.float().numpy().copy() for name, tensor in full_weights(self.model, bucket_bytes)}

    def export(self, folder: str, file_bytes: int) -> None:
        """Write the model as Hugging Face files."""
        write_sharded(self.model, Path(folder) if self.rank == 0 else None, file_bytes)

    def is_sharded(self) -> bool:
        """Whether this rank holds less than the model between passes."""
        return sum(p.numel() for p in self.model.parameters()) < sum(
            int(np.prod(getattr(p, "ds_shape", p.shape))) for p in self.model.parameters()
        )

    def score(self, model: str, config: ScoringEngine, scalar: bool, sharded: bool) -> np.ndarray:
        """What a model that only scores says of all sequences."""
        engine = ForwardEngine(load(model, DTYPES[config.dtype], scalar=scalar, sharded=sharded), config)
        return outputs(engine, list(range(len(SEQUENCES))), scalar=scalar).float().numpy()

    def loading_growth(self, model: str, sharded: bool) -> int:
        """Bytes by which this process was larger at most while it loaded a model to score with."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        config = ScoringEngine(zero_stage=3, dtype="float32")
        engine = ForwardEngine(load(model, torch.float32, scalar=False, sharded=sharded), config)
        grown = _status("VmHWM") - before
        del engine
        return grown

    def save(self, folder: str) -> None:
        """Write a checkpoint."""
        self.engine.save(Path(folder))

    def load(self, folder: str) -> None:
        """Read a checkpoint."""
        self.engine.load(Path(folder))


Ranks = RankGroup[TrainingRank]


def _status(name: str) -> int:
    """Memory of this process in bytes: `VmRSS` now, `VmHWM` at most."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


@contextmanager
def started(*sizes: int) -> Iterator[dict[int, Ranks]]:
    """Groups of ranks by their sizes."""
    made = {}
    for ranks in sizes:
        actors = [
            actor_class(TrainingRank).options(num_cpus=0, runtime_env={"env_vars": ENV})
            .remote("trainer", rank, ranks, seed=0, deterministic=False)
            for rank in range(ranks)
        ]  # fmt: skip
        made[ranks] = Ranks("trainer", actors)
    join_collectives_of(list(made.values()), Timeouts(setup_s=120.0))
    yield made
    for group in made.values():
        group.kill()


LIMIT = Limit(BUILD_S, "no setting: a test")


def run(group: Ranks, method: Callable[..., R], *args: object) -> list[R]:
    """Call a method on every rank and wait."""
    return group.call(method, *args).wait(LIMIT)


def run_each(group: Ranks, method: Callable[..., R], per_rank: Sequence[tuple[Any, ...]]) -> list[R]:
    """Call a method on every rank with arguments of its own and wait."""
    return group.call_each(method, per_rank).wait(LIMIT)
