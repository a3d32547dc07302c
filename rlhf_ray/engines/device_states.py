"""What a DeepSpeed engine has on its device, moved to host memory and back."""

from typing import Any

import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum

from rlhf_ray.config.roles import Level
from rlhf_ray.config.training import TrainingEngine
from rlhf_ray.platform import platform

_WEIGHTS = {OffloadStateTypeEnum.lp_params}
_OPTIMIZER = {OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states}
_REST = {OffloadStateTypeEnum.lp_grads, OffloadStateTypeEnum.contiguous_grad_buffer}


class DeviceStates:
    """Weights, gradients and optimizer state of a DeepSpeed engine of ZeRO stage 1, 2 or 3.

    Args:
        engine: DeepSpeed's.
        config: what it was made from; what that keeps in host memory stays there.
    """

    def __init__(self, engine: Any, config: TrainingEngine) -> None:
        self._engine, self._config = engine, config

    def move(self, level: Level) -> None:
        """Have on the device what `level` says, and nothing else."""
        if self._config.offload_parameters != "none":  # and so the optimizer's state: there is nothing to move
            return
        on_device = set()
        if level >= Level.WEIGHTS:
            on_device |= _WEIGHTS
        if level == Level.FULL:
            on_device |= _OPTIMIZER | _REST
        # What goes makes room for what comes.
        self._offload((_WEIGHTS | _OPTIMIZER | _REST) - on_device)
        self._reload(on_device)

    def _offload(self, states: set[OffloadStateTypeEnum]) -> None:
        if states & _OPTIMIZER and self._moves_optimizer_itself:
            _move_optimizer(self._engine.optimizer, "cpu")
            states = states - _OPTIMIZER
        if states:
            pinned = platform().device.type == "cuda"
            self._engine.offload_states(include=states, device=OffloadDeviceEnum.cpu, pin_memory=pinned)

    def _reload(self, states: set[OffloadStateTypeEnum]) -> None:
        optimizer = self._engine.optimizer
        # DeepSpeed reloads all that it counts as offloaded: what stays out is kept from it.
        stays = optimizer.offloaded_states - states
        optimizer.offloaded_states -= stays
        self._engine.reload_states()
        optimizer.offloaded_states |= stays
        if states & _OPTIMIZER and self._moves_optimizer_itself:
            _move_optimizer(optimizer, platform().device)

    @property
    def _moves_optimizer_itself(self) -> bool:
        """In stage 3 DeepSpeed moves optimizer state only of its own FusedAdam."""
        return self._config.zero_stage == 3 and self._config.offload_optimizer == "none"


def _move_optimizer(optimizer: Any, device: str | torch.device) -> None:
    """Master weights and Adam's moments of a rank of stage 3."""
    for master in optimizer.fp32_partitioned_groups_flat:
        master.data = master.data.to(device)
    for state in optimizer.optimizer.state.values():
        state |= {name: value.to(device) for name, value in state.items() if torch.is_tensor(value)}
