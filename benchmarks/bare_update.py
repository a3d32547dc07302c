"""The policy update without this package's actors, engine and losses: what a careful script in plain torch does."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf_ray.actors.columns import TrainingColumns
from rlhf_ray.algorithms.moments import Moments, whiten
from rlhf_ray.config.algorithm import PPO
from rlhf_ray.config.training import Policy
from rlhf_ray.data.minibatches import OptimizerStep
from rlhf_ray.data.trajectory import TrajectoryBatch, take_rows
from rlhf_ray.engines.training import DTYPES
from rlhf_ray.models.attention import PACKED_ATTENTION
from rlhf_ray.models.responses import ResponsePack
from rlhf_ray.platform import platform


@dataclass(frozen=True)
class BareReport:
    """One update.

    Attributes:
        grad_norm: before clipping, mean over the optimizer steps.
        seconds: it took.
    """

    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class _MicroBatch:
    pack: ResponsePack
    old_logprobs: torch.Tensor
    advantages: torch.Tensor


class BareLoop:
    """Holds the model, float32 master weights with their AdamW, and the micro-batches, packed ahead of time.

    With bfloat16, weights, activations and gradients are bfloat16 and the optimizer updates float32 copies; with
    float32 it updates the weights themselves.
    """

    def __init__(
        self,
        policy: Policy,
        ppo: PPO,
        batch: TrajectoryBatch,
        columns: TrainingColumns,
        moments: Moments,
        plan: Sequence[OptimizerStep],
    ) -> None:
        device = platform().device
        self._ppo, self._clip = ppo, policy.engine.gradient_clip
        self._model = AutoModelForCausalLM.from_pretrained(
            policy.model, dtype=DTYPES[policy.engine.dtype], attn_implementation=PACKED_ATTENTION
        ).to(device)
        self._model.train()
        self._weights: list[nn.Parameter] = list(self._model.parameters())
        self._masters = (
            self._weights
            if policy.engine.dtype == "float32"
            else [nn.Parameter(weight.detach().float()) for weight in self._weights]
        )
        settings = policy.optimizer
        self._adam = torch.optim.AdamW(
            self._masters,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

        def column(values: np.ndarray, samples: Sequence[int]) -> torch.Tensor:
            return torch.from_numpy(values[take_rows(batch.response_offsets, samples)]).to(device)

        self._steps = [
            (
                step.step_tokens,
                [
                    _MicroBatch(
                        ResponsePack.of(batch, micro, device),
                        column(columns.old_logprobs, micro),
                        whiten(column(columns.advantages, micro), moments),
                    )
                    for micro in step.micro_batches
                ],
            )
            for step in plan
        ]

    def update(self) -> BareReport:
        """All optimizer steps of the plan, once."""
        began = time.perf_counter()
        norms = []
        for tokens, micro_batches in self._steps:
            for micro in micro_batches:
                loss = self._loss(micro).sum() / tokens
                loss.backward()
            norms.append(self._step())
        return BareReport(float(np.mean(norms)), time.perf_counter() - began)

    def _loss(self, micro: _MicroBatch) -> torch.Tensor:
        packed = micro.pack.packed
        hidden = self._model.base_model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            use_cache=False,
            cu_seq_lens_q=packed.cu_seqlens,
            cu_seq_lens_k=packed.cu_seqlens,
            max_length_q=packed.max_length,
            max_length_k=packed.max_length,
        ).last_hidden_state[0]
        logits = self._model.get_output_embeddings()(hidden[micro.pack.positions]).float()
        logprobs = logits.log_softmax(-1).gather(-1, micro.pack.targets[:, None])[:, 0]
        ratio = (logprobs - micro.old_logprobs).exp()
        clipped = ratio.clamp(1 - self._ppo.clip, 1 + self._ppo.clip)
        return -torch.minimum(ratio * micro.advantages, clipped * micro.advantages)

    def _step(self) -> float:
        if self._masters is not self._weights:
            for master, weight in zip(self._masters, self._weights, strict=True):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
        norm = float(nn.utils.clip_grad_norm_(self._masters, self._clip))
        self._adam.step()
        self._adam.zero_grad()
        if self._masters is not self._weights:
            with torch.no_grad():
                torch._foreach_copy_(list[torch.Tensor](self._weights), list[torch.Tensor](self._masters))
        return norm
