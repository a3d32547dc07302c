"""A rank that trains a tiny model on given sequences, with the training engine of the package."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad

from rlhf_ray.actors.worker import Worker
from rlhf_ray.config.training import Lora, Optimizer, TrainingEngine
from rlhf_ray.engines.level import Level
from rlhf_ray.engines.training import DTYPES, full_weights
from rlhf_ray.engines.training import TrainingEngine as Engine
from rlhf_ray.models.heads import CausalModel, load_causal
from rlhf_ray.models.packed import PackedSequences

Weights = dict[str, np.ndarray]

SEQUENCES = [np.random.default_rng(0).integers(3, 512, n).astype(np.int32) for n in (5, 9, 17, 32, 9, 11, 12, 30)]
PREDICTED = sum(len(tokens) - 1 for tokens in SEQUENCES)
# With the usual eps the first step of a weight whose gradient is nearly 0 is the sign of its rounding error.
OPTIMIZER = Optimizer(lr=1e-3, eps=1e-5, warmup_steps=1, schedule="linear", weight_decay=0.01)
TOTAL_STEPS = 5
LORA_SEED = 5


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


def token_mean_loss(model: Any, sequences: list[int]) -> torch.Tensor:
    """These sequences' share of the mean over all tokens: negative log-prob, and a little entropy."""
    packed = PackedSequences.of(
        [SEQUENCES[number] for number in sequences] or [np.zeros(1, np.int32)], torch.device("cpu")
    )
    predicts = torch.ones(packed.input_ids.shape[1], dtype=torch.bool)
    predicts[packed.cu_seqlens[1:].long() - 1] = False
    positions = predicts.nonzero()[:, 0]
    logprobs, entropy = model(packed, positions, packed.input_ids[0][positions + 1], 1.0)
    return -(logprobs.sum() + 0.01 * entropy.sum()) / PREDICTED


class TrainingRank(Worker):
    """One rank; it can build one engine after the other."""

    def build(self, model: str, config: TrainingEngine, seed: int = 0, lora: Lora | None = None) -> None:
        """A new engine around a new model."""
        torch.manual_seed(LORA_SEED + self.rank)  # rank 0's adapters are all ranks'
        loaded = load_causal(model, dtype=DTYPES[config.dtype], vocab_chunk_tokens=16, lora=lora)
        if seed:  # other weights than those of the folder
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in filter(lambda parameter: parameter.requires_grad, loaded.parameters()):
                    parameter.add_(torch.randn_like(parameter))
        self.model: CausalModel = loaded
        self.engine = Engine(loaded, config, OPTIMIZER, TOTAL_STEPS)

    def train(self, steps: int, micro_batches: list[list[int]], moves: Sequence[Level] = ()) -> Trained:
        """Optimizer steps, each on these micro-batches of this rank, leaving the device and coming back in between."""
        found = Trained()
        for _ in range(steps):
            for level in moves:
                self.engine.move(level)
                if level == Level.WEIGHTS:
                    with torch.no_grad():
                        token_mean_loss(self.engine, micro_batches[0])
            for number, micro_batch in enumerate(micro_batches):
                loss = token_mean_loss(self.engine, micro_batch)
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

    def is_sharded(self) -> bool:
        """Whether this rank holds less than the model between passes."""
        return sum(p.numel() for p in self.model.parameters()) < sum(
            int(np.prod(getattr(p, "ds_shape", p.shape))) for p in self.model.parameters()
        )

    def save(self, folder: str) -> None:
        """Write a checkpoint."""
        self.engine.save(Path(folder))

    def load(self, folder: str) -> None:
        """Read a checkpoint."""
        self.engine.load(Path(folder))


def _status(name: str) -> int:
    """Memory of this process in bytes: `VmRSS` now, `VmHWM` at most."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024
