"""What tests do inside policy ranks, through `actor.__ray_call__`."""

import deepspeed
import torch

from rlhf_ray.actors.policy import PolicyWorker
from rlhf_ray.engines.training import full_weights
from rlhf_ray.models.weights import model_weights


def change_weights(worker: PolicyWorker, part: str, seed: int) -> int:
    """Scale every weight whose name holds `part` by random factors, and say how many tensors that were; collective."""
    chosen = [weight.parameter for weight in model_weights(worker.engine.model) if part in weight.name]
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad(), deepspeed.zero.GatheredParameters(chosen, modifier_rank=0):
        for parameter in chosen:
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=random))
    return len(chosen)


def change_trained(worker: PolicyWorker, seed: int) -> int:
    """Move all that is trained by random steps, and say how many tensors that were; collective."""
    chosen = [parameter for parameter in worker.engine.model.parameters() if parameter.requires_grad]
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad(), deepspeed.zero.GatheredParameters(chosen, modifier_rank=0):
        for parameter in chosen:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return len(chosen)


def whole_weights(worker: PolicyWorker) -> dict[str, torch.Tensor]:
    """All weights; collective."""
    return {name: tensor.detach().clone() for name, tensor in full_weights(worker.engine.model, 2**20)}
