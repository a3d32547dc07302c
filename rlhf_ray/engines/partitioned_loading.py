"""ZeRO-3 from files: each rank reads its own part of each parameter, so that no rank ever holds the whole model."""

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from torch import nn

from rlhf_ray.models.on_meta import replace_parameter
from rlhf_ray.models.role_models import RoleModel
from rlhf_ray.models.stored_weights import StoredWeights, is_finite, not_finite
from rlhf_ray.models.weights import hub_name


def read_partitions(model: RoleModel, settings: Mapping[str, Any]) -> None:
    """Make each parameter on the meta device a ZeRO-3 parameter that holds this rank's part of what is stored.

    A rank reads the rows that its part covers and nothing else, without a word to the others. Beside the parts it holds
    one buffer of the size of the largest parameter; of that, memory is taken up where the part lies. Parameters that
    are in memory (adapters, a new head) stay as they are for DeepSpeed to broadcast and cut up.

    Args:
        model: what `load_causal` or `load_scalar` gave with `sharded`; any other is left alone.
        settings: for `deepspeed.initialize`.

    Raises:
        ValueError: what is stored holds NaN or infinity; naming tensor and file.
    """
    if model.stored is None:
        return
    # Given a module, even an empty one, DeepSpeed also replaces torch's `linear` by one that saves no gathered weights.
    zero = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=dict(settings))
    on_meta = [(hub_name(name), parameter) for name, parameter in model.named_parameters() if parameter.is_meta]
    largest = max((parameter.numel() for _, parameter in on_meta), default=0)
    buffer = torch.empty(largest, dtype=zero.dtype, device=zero.local_device)
    for name, parameter in on_meta:
        replace_parameter(model, parameter, _partitioned(zero, name, parameter, model.stored, buffer))
    model.stored = None


def _partitioned(
    zero: Any, name: str, parameter: nn.Parameter, stored: StoredWeights, buffer: torch.Tensor
) -> nn.Parameter:
    whole = buffer[: parameter.numel()]
    size = -(-len(whole) // zero.dp_world_size)  # DeepSpeed pads the last ranks' parts
    start, stop = (min(end, len(whole)) for end in (zero.rank * size, (zero.rank + 1) * size))
    if start < stop:
        rows = stored.read(name, start, stop)
        if not is_finite(rows):
            raise ValueError(not_finite(name, stored.files(name)))
        whole[start:stop].copy_(rows)
    part = nn.Parameter(whole.view(parameter.shape), requires_grad=parameter.requires_grad)
    # DeepSpeed's public ways, `zero.Init` with the module and `convert_to_zero_parameters`, broadcast the whole
    # parameter from rank 0 before they cut it up, so rank 0 would have to hold it all.
    zero._convert_to_deepspeed_param(part)
    part.partition()  # type: ignore[attr-defined]
    return part
