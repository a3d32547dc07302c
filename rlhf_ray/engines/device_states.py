"""What a DeepSpeed engine has on its device, moved to host memory and back.

DeepSpeed moves states itself, but not all of them (0.19, `offload_states` of both its optimizers):

- Frozen weights, those under adapters, are none of its optimizer's business. In stages 1 and 2 they stay on the device;
  in stage 3 they make it fail, as it lays all parameters of the model into a buffer that has room for the trained ones.
- In stage 3 it moves optimizer state of no other Adam than its own FusedAdam, which has to be compiled by nvcc.

So frozen weights, and in stage 3 weights and optimizer state, are moved here; what is left is DeepSpeed's.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.runtime.zero.utils import get_mapping_to_flat_buffer
from torch import nn

from rlhf_ray.config.roles import Level
from rlhf_ray.config.training import TrainingEngine
from rlhf_ray.engines.host_copies import HostCopies
from rlhf_ray.platform import platform

_WEIGHTS = {OffloadStateTypeEnum.lp_params}
_OPTIMIZER = {OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states}
_REST = {OffloadStateTypeEnum.lp_grads, OffloadStateTypeEnum.contiguous_grad_buffer}


class DeviceStates:
    """Weights, gradients and optimizer state of a DeepSpeed engine of ZeRO stage 1, 2 or 3.

    Args:
        engine: DeepSpeed's.
        config: what it was made from; what that keeps in host memory stays there.

    Attributes:
        level: what is on the device.
    """

    def __init__(self, engine: Any, config: TrainingEngine) -> None:
        self._engine, self._config = engine, config
        self._host = HostCopies()
        self._sharded = config.zero_stage == 3
        moves_shards = self._sharded and config.offload_parameters == "none"
        self._trains_shards = moves_shards and _trains_shards(engine.optimizer)
        self.level = Level.FULL

    def move(self, level: Level) -> None:
        """Have on the device what `level` says, and nothing else."""
        if self._config.offload_parameters != "none":
            # Shards and optimizer state are in host memory at all times. What was gathered of them may be left.
            if level == Level.OUT:
                self._engine.empty_partition_cache()
        else:
            on_device = set()
            if level >= Level.WEIGHTS:
                on_device |= _WEIGHTS
            if level == Level.FULL:
                on_device |= _OPTIMIZER | _REST
            # What goes makes room for what comes.
            self._leave((_WEIGHTS | _OPTIMIZER | _REST) - on_device)
            self._come(on_device)
        self.level = level

    def _leave(self, states: set[OffloadStateTypeEnum]) -> None:
        if not states:
            return
        if self._sharded:
            self._engine.empty_partition_cache()
        if states & _WEIGHTS:
            self._host.leave(frozen_tensors(self._engine.module), unchanged=True)
        if self._sharded:
            if states & _WEIGHTS:
                self._host.leave([self._engine.optimizer.lp_param_buffer])
                self._lay_out_shards()
            if states & _OPTIMIZER and self._config.offload_optimizer == "none":
                self._host.leave(self._optimizer_tensors())
            states = states & _REST
        pinned = platform().device.type == "cuda"
        self._engine.offload_states(include=states, device=OffloadDeviceEnum.cpu, pin_memory=pinned)

    def _come(self, states: set[OffloadStateTypeEnum]) -> None:
        optimizer = self._engine.optimizer
        # DeepSpeed reloads all that it counts as offloaded: what stays out is kept from it.
        stays = optimizer.offloaded_states - states
        optimizer.offloaded_states -= stays
        self._engine.reload_states()
        optimizer.offloaded_states |= stays
        if states & _WEIGHTS:
            self._host.come(frozen_tensors(self._engine.module))
        if self._sharded and states & _WEIGHTS:
            self._host.come([optimizer.lp_param_buffer])
            self._lay_out_shards()
        if self._sharded and states & _OPTIMIZER:
            self._host.come(self._optimizer_tensors())

    def _lay_out_shards(self) -> None:
        """Have the trained shards of stage 3 be parts of their common buffer, wherever that is."""
        optimizer = self._engine.optimizer
        shards = optimizer._get_parameter_partitions()
        for shard, offset, size in get_mapping_to_flat_buffer(shards):
            shard.data = optimizer.lp_param_buffer.narrow(0, offset, size)
        optimizer.fp16_partitioned_groups_flat.clear()
        optimizer._set_fp16_partitioned_groups_flat()
        if self._trains_shards:
            masters, groups = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat
            for master, group in zip(masters, groups, strict=True):
                master.data = group

    def _optimizer_tensors(self) -> Iterator[torch.Tensor]:
        """Adam's state in stage 3, and the master weights that it goes with."""
        optimizer = self._engine.optimizer
        if not self._trains_shards:
            yield from optimizer.fp32_partitioned_groups_flat
        for state in optimizer.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def _trains_shards(optimizer: Any) -> bool:
    """Whether stage 3 has no master weights beside its shards, which is so in float32."""
    masters, groups = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat
    return all(master.data_ptr() == group.data_ptr() for master, group in zip(masters, groups, strict=True))


def frozen_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """What a model is made of that is not trained: shards under ZeRO-3, and beside codes of 4 bits their scales."""
    return tensors_of(parameter for parameter in model.parameters() if not parameter.requires_grad)


def tensors_of(parameters: Iterable[nn.Parameter]) -> Iterator[torch.Tensor]:
    """Where the numbers of parameters are."""
    for parameter in parameters:
        yield getattr(parameter, "ds_tensor", parameter)
        scales = getattr(parameter, "quant_state", None)  # of bitsandbytes, which quantises scales once more
        while scales is not None:
            yield from (tensor for tensor in vars(scales).values() if torch.is_tensor(tensor))
            scales = getattr(scales, "state2", None)
