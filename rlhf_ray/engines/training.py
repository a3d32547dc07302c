"""One rank of a DeepSpeed engine: forward, backward, step, checkpoint, and the weights it can send."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rlhf_ray.config import training as config
from rlhf_ray.config.roles import Level
from rlhf_ray.engines.collectives import share_sequences
from rlhf_ray.engines.cpu_adam import cpu_adam
from rlhf_ray.engines.deepspeed_settings import deepspeed_settings
from rlhf_ray.engines.device_states import DeviceStates, tensors_of
from rlhf_ray.engines.host_copies import HostCopies
from rlhf_ray.engines.own_folder import OwnFolder
from rlhf_ray.engines.partitioned_loading import read_partitions
from rlhf_ray.engines.presence import check_there
from rlhf_ray.engines.swap_folder import swap_folder
from rlhf_ray.engines.swapped_state import load_into_swap_files, swap_files_mapped
from rlhf_ray.models.lora import Adapter
from rlhf_ray.models.role_models import RoleModel
from rlhf_ray.models.token_logprobs import TokenLogProbs
from rlhf_ray.models.weights import Weight, model_weights
from rlhf_ray.platform import platform

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class StepStats:
    """What an optimizer step was like.

    Attributes:
        grad_norm: global norm before clipping.
        lr: learning rate that the step used.
    """

    grad_norm: float
    lr: float


class TrainingEngine:
    """DeepSpeed around one model. Every method is collective: all ranks of the role call it in the same order.

    Micro-batches accumulate until one is marked as the last; losses passed to `backward` are this rank's share
    of a sum over all ranks, so the gradient is that of the summed loss for any number of ranks. Ranks that share
    sequences pass the same loss, which counts once.

    Attributes:
        model: that is trained.
        sharded: no rank has the whole of it.
        sequence_parallel: ranks that share every micro-batch.
    """

    def __init__(
        self, model: RoleModel, engine: config.TrainingEngine, optimizer: config.Optimizer, total_steps: int
    ) -> None:
        self._world_size = torch.distributed.get_world_size()
        self.sharded = engine.zero_stage == 3
        self.sequence_parallel = engine.sequence_parallel
        if engine.activation_checkpointing:
            _checkpoint_activations(model)
        self._swap, settings = _prepare(model.train(), engine)
        adam = _adam(model, engine, optimizer)
        self._schedule = LambdaLR(adam, lr_factor(optimizer, total_steps))
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=adam, lr_scheduler=self._schedule, config=settings
        )
        # In stage 0 with bfloat16, DeepSpeed allocates Adam's state by a step on zero gradients and leaves it counted,
        # which spoils the bias correction of the first real steps.
        if engine.zero_stage == 0:
            adam.state.clear()
        if engine.zero_stage == 3:
            _announce_shared_weights(model)
        self._states = DeviceStates(self._engine, engine)
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass. Raises `NotOnDeviceError` while it has left its device, as all methods do."""
        check_there("a forward pass", self._states.level, Level.WEIGHTS)
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the loss; `last` ends the accumulation."""
        check_there("a backward pass", self._states.level, Level.FULL)
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._world_size)  # DeepSpeed averages over ranks; the loss is a sum

    def step(self) -> StepStats:
        """Clip, update the weights and move the schedule."""
        check_there("an optimizer step", self._states.level, Level.FULL)
        lr = self._schedule.get_last_lr()[0]
        plain = self._engine.optimizer is self._engine.basic_optimizer  # stage 0 in float32: DeepSpeed keeps no norm
        norm = (
            torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            if plain
            else None
        )
        self._engine.step()
        return StepStats(
            grad_norm=float(norm if norm is not None else self._engine.get_global_grad_norm()), lr=float(lr)
        )

    def move(self, level: Level) -> None:
        """Leave the device, or come back to it, as far as `level` says."""
        self._states.move(level)

    def save(self, folder: Path) -> None:
        """Write what is trained, optimizer and schedule; each rank writes its own shards into `folder`."""
        check_there("a checkpoint", self._states.level, Level.FULL)
        with swap_files_mapped(self._engine):
            self._engine.save_checkpoint(str(folder), tag="state", save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, with the same number of ranks."""
        check_there("reading a checkpoint", self._states.level, Level.FULL)
        if not (folder / "state").is_dir():
            raise FileNotFoundError(f"{folder} holds no DeepSpeed checkpoint")
        if self._swap is None:
            self._engine.load_checkpoint(str(folder), tag="state")
        else:
            load_into_swap_files(self._engine, folder, tag="state")


class ForwardEngine:
    """A model that only scores: whole on every rank, or sharded by ZeRO-3 and gathered layer by layer.

    Attributes:
        model: that scores.
        sequence_parallel: ranks that share every micro-batch.
    """

    def __init__(self, model: RoleModel, engine: config.ScoringEngine) -> None:
        self.sequence_parallel = engine.sequence_parallel
        self._swap, settings = _prepare(model.eval().requires_grad_(False), engine)
        self.model = model
        self._level, self._host, self._changed = Level.FULL, HostCopies(), False
        self._sharded = engine.zero_stage == 3
        self._forward: Any = model
        if self._sharded:
            self._forward, *_ = deepspeed.initialize(model=model, config=settings)
            _announce_shared_weights(model)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass, without gradients. Raises `NotOnDeviceError` while it has left its device."""
        check_there("a forward pass", self._level, Level.WEIGHTS)
        return self._forward(*args, **kwargs)

    def move(self, level: Level) -> None:
        """Leave the device at `Level.OUT`, else come back to it.

        A copy in host memory is kept, as weights that only score do not change: they leave by being dropped. Shards
        that are kept in host memory stay there; of these, what is gathered on the device goes.
        """
        if level == Level.OUT and self._sharded:
            self._forward.empty_partition_cache()
        elif level == Level.OUT:
            self._host.leave(tensors_of(self.model.parameters()), unchanged=not self._changed)
            self._changed = False
        else:
            self._host.come(tensors_of(self.model.parameters()))
        deepspeed.get_accelerator().empty_cache()
        self._level = level

    def mix(self, weights: Mapping[str, torch.Tensor], share: float) -> None:
        """Move weights, by Hugging Face name, by `share` of their way to these; collective, the same on every rank."""
        self._changed = True
        own = {weight.name: weight.parameter for weight in model_weights(self.model)}
        for name, weight in weights.items():
            parameter = own[name]
            sharded = [parameter] if hasattr(parameter, "ds_id") else []
            with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0):
                # In float32: a small share of a small difference is less than a step of bfloat16.
                mixed = torch.lerp(parameter.data.float(), weight.to(parameter.device).float(), share)
                parameter.data.copy_(mixed)

    def save(self, folder: Path, *, write: bool) -> None:
        """Write the weights whole; collective, one rank writes."""
        weights = copy_to_host(self.model, keep=write)
        if write:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, folder / _REFERENCE_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; collective."""
        self.mix(load_file(folder / _REFERENCE_FILE), share=1.0)


_REFERENCE_FILE = "weights.safetensors"


def lr_factor(optimizer: config.Optimizer, total_steps: int) -> Callable[[int], float]:
    """Learning rate at a step as a fraction of the peak."""

    def factor(step: int) -> float:
        if step < optimizer.warmup_steps:
            return (step + 1) / (optimizer.warmup_steps + 1)
        progress = (step - optimizer.warmup_steps) / max(1, total_steps - optimizer.warmup_steps)
        progress = min(1.0, progress)
        match optimizer.schedule:
            case "constant":
                return 1.0
            case "linear":
                shape = 1.0 - progress
            case "cosine":
                shape = 0.5 * (1.0 + math.cos(math.pi * progress))
        return optimizer.min_lr_ratio + (1.0 - optimizer.min_lr_ratio) * shape

    return factor


def full_weights(model: nn.Module, bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole tensors under their Hugging Face names, adapters merged, one after the other; collective.

    Under ZeRO-3 they are gathered `bucket_bytes` at a time (or one, if larger), so the whole model never exists on a
    rank. A tensor is valid as long as it is held and the model is not trained.
    """
    bucket: list[Weight] = []
    held = 0
    for weight in model_weights(model):
        if bucket and held + weight.bytes > bucket_bytes:
            yield from _gathered(bucket)
            bucket, held = [], 0
        bucket.append(weight)
        held += weight.bytes
    yield from _gathered(bucket)


def copy_to_host(model: nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """Copies of `full_weights` in host memory, none on a rank that does not keep them; collective."""
    copies = {}
    for name, tensor in full_weights(model, bucket_bytes=256 * 2**20):
        if keep:
            copies[name] = tensor.detach().to("cpu", copy=True)
    return copies


def _gathered(bucket: list[Weight]) -> Iterator[tuple[str, torch.Tensor]]:
    with _whole([part for weight in bucket for part in weight.parts]):
        for weight in bucket:
            yield weight.name, weight.value()


def full_adapter(model: nn.Module) -> Adapter:
    """The adapter of a model that has one, with whole tensors in host memory; collective."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with _whole(list(trained.values())):
        return Adapter.of(model, {name: part.detach().to("cpu", copy=True) for name, part in trained.items()})


def _whole(parameters: Sequence[nn.Parameter]) -> Any:
    """A context in which ZeRO-3's shards are whole parameters."""
    return deepspeed.zero.GatheredParameters([parameter for parameter in parameters if hasattr(parameter, "ds_id")])


def _adam(model: nn.Module, engine: config.TrainingEngine, optimizer: config.Optimizer) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {
        "lr": optimizer.lr,
        "betas": optimizer.betas,
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
    if engine.offload_optimizer != "none":
        return cpu_adam(parameters, settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


def _prepare(
    model: RoleModel, engine: config.TrainingEngine | config.ScoringEngine
) -> tuple[OwnFolder | None, dict[str, Any]]:
    """Have a model on its device, or its part of the model; the folder that it may swap to, and DeepSpeed's settings.

    Collective.
    """
    if engine.sequence_parallel > 1:
        model.sequence_parallel = share_sequences(engine.sequence_parallel)
    swap = None if engine.nvme_path is None else swap_folder(engine.nvme_path)
    settings = deepspeed_settings(engine, model, swap)
    read_partitions(model, settings)
    model.to(platform().device)
    return swap, settings


def _checkpoint_activations(model: nn.Module) -> None:
    inner = model.model
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[union-attr,operator]


def _announce_shared_weights(model: nn.Module) -> None:
    """Have ZeRO-3 gather the vocabulary weight for the module that uses it without owning it."""
    for module in model.modules():
        if isinstance(module, TokenLogProbs):
            deepspeed.zero.register_external_parameter(module, module.weight)
