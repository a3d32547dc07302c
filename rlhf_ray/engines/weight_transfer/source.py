"""The trainer's weights as vLLM's trainer-side transfer engines take them."""

from collections.abc import Iterator

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from rlhf_ray.engines.training import full_weights
from rlhf_ray.models.weights import model_weights


class ModelWeights(WeightSource):
    """A model's weights under their Hugging Face names, adapters merged. Every rank iterates; each pass is fresh."""

    def __init__(self, model: nn.Module, bucket_bytes: int) -> None:
        self._model = model
        self._bucket_bytes = bucket_bytes

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and full shape of every tensor, gathering nothing."""
        return [ParamMeta(weight.name, weight.dtype, weight.shape) for weight in model_weights(self._model)]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return full_weights(self._model, self._bucket_bytes)
