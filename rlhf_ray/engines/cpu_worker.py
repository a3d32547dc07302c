"""What each worker of an engine has on CPU, through `worker_extension_cls`: our gloo backend, the C kernels, and a way
to lose its weights."""

from typing import Any

import torch

from rlhf_ray.engines import cpu_kernels
from rlhf_ray.engines.weight_transfer import gloo

__all__ = ["WorkerExtension", "cpu_kernels", "gloo"]


class WorkerExtension:
    """A base class that vLLM adds to its worker's."""

    model_runner: Any

    @torch.no_grad()
    def lose_weights(self) -> None:
        """Make all parameters NaN. On a GPU they are lost in vLLM's deep sleep; here a run that forgot to send new ones
        would otherwise go on as if nothing were missing."""
        for parameter in self.model_runner.get_model().parameters():
            if parameter.is_floating_point():
                parameter.fill_(torch.nan)
