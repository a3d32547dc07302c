"""Updates without this package's actors, engine and losses: what a careful script in plain torch does."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf_ray.algorithms.moments import Moments, whiten
from rlhf_ray.config.algorithm import PPO
from rlhf_ray.config.training import Optimizer, Policy, TrainingEngine
from rlhf_ray.data.minibatches import OptimizerStep
from rlhf_ray.data.trajectory import Floats, TrajectoryBatch, take_rows
from rlhf_ray.engines.training import DTYPES
from rlhf_ray.models.attention import PACKED_ATTENTION
from rlhf_ray.models.heads import load_scalar
from rlhf_ray.models.packed import PackedSequences
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


class BareModel:
    """A model, float32 master weights, and their AdamW.

    With bfloat16, weights, activations and gradients are bfloat16 and the optimizer updates float32 copies; with
    float32 it updates the weights themselves.
    """

    def __init__(
        self, model: str, engine: TrainingEngine, optimizer: Optimizer, *, scalar_seed: int | None = None
    ) -> None:
        """`scalar_seed` asks for a scalar head; a new one is drawn as for our own model."""
        dtype = DTYPES[engine.dtype]
        self.model: Any = (
            AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=PACKED_ATTENTION)
            if scalar_seed is None
            else load_scalar(model, dtype=dtype, seed=scalar_seed).model
        )
        self.model.to(platform().device)
        self.model.train()
        self._clip = engine.gradient_clip
        self._weights: list[nn.Parameter] = list(self.model.parameters())
        self._masters = (
            self._weights
            if engine.dtype == "float32"
            else [nn.Parameter(weight.detach().float()) for weight in self._weights]
        )
        self._adam = torch.optim.AdamW(
            self._masters,
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def step(self) -> float:
        """Clip and update; the gradient norm before clipping."""
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


def hidden_states(model: Any, packed: PackedSequences) -> torch.Tensor:
    """`[tokens, hidden]` of a pack."""
    hidden: torch.Tensor = model.base_model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        use_cache=False,
        cu_seq_lens_q=packed.cu_seqlens,
        cu_seq_lens_k=packed.cu_seqlens,
        max_length_q=packed.max_length,
        max_length_k=packed.max_length,
    ).last_hidden_state[0]
    return hidden


class BareLoop:
    """The policy's update; its micro-batches are packed ahead of time."""

    def __init__(
        self,
        policy: Policy,
        ppo: PPO,
        batch: TrajectoryBatch,
        old_logprobs: Floats,
        advantages: Floats,
        moments: Moments,
        plan: Sequence[OptimizerStep],
    ) -> None:
        device = platform().device
        self._ppo = ppo
        self._bare = BareModel(policy.model, policy.engine, policy.optimizer)

        def column(values: Floats, samples: Sequence[int]) -> torch.Tensor:
            return torch.from_numpy(values[take_rows(batch.response_offsets, samples)]).to(device)

        self._steps = [
            (
                step.step_tokens,
                [
                    _MicroBatch(
                        ResponsePack.of(batch, micro, device),
                        column(old_logprobs, micro),
                        whiten(column(advantages, micro), moments),
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
            norms.append(self._bare.step())
        return BareReport(float(np.mean(norms)), time.perf_counter() - began)

    def _loss(self, micro: _MicroBatch) -> torch.Tensor:
        hidden = hidden_states(self._bare.model, micro.pack.packed)
        logits = self._bare.model.get_output_embeddings()(hidden[micro.pack.positions]).float()
        logprobs = logits.log_softmax(-1).gather(-1, micro.pack.targets[:, None])[:, 0]
        ratio = (logprobs - micro.old_logprobs).exp()
        clipped = ratio.clamp(1 - self._ppo.clip, 1 + self._ppo.clip)
        return -torch.minimum(ratio * micro.advantages, clipped * micro.advantages)
