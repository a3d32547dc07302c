"""Log-probabilities at chosen positions, without the logits of all of them at once."""

from typing import Any, Literal

import torch
from torch import nn

# What is measured of each distribution beside the log-prob of the target; each takes a pass over the logits.
Beside = Literal["entropy", "collision", "nothing"]


class TokenLogProbs(nn.Module):
    """The vocabulary head of a causal model, applied to a few hundred positions at a time.

    Logits `[chunk, vocab]` are made, reduced and dropped; the backward pass makes them again. Peak memory is
    therefore that of one chunk, however many positions there are.
    """

    def __init__(self, head: nn.Module, chunk_tokens: int) -> None:
        super().__init__()
        self.chunk_tokens = chunk_tokens
        # Held in a tuple so that the head is not registered a second time as a child.
        self._head = (head,)

    @property
    def weight(self) -> torch.Tensor:
        """`[vocab, hidden]`; tied to the embedding in many models."""
        weight = self._head[0].weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, beside: Beside = "entropy"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of `targets`, and what is measured beside it, both float32 `[positions]`.

        Args:
            hidden: `[positions, hidden]`, the states that predict the targets.
            targets: int64 `[positions]`.
            temperature: divides the logits.
            beside: `entropy` in nats; `collision`, log Σ p², without a gradient; with `nothing` the second is empty.
        """
        out = _ChunkedLogProbs.apply(hidden, self.weight, targets, temperature, self.chunk_tokens, beside)
        return out


class _ChunkedLogProbs(torch.autograd.Function):
    """With p = softmax(z), H = −Σ p log p: ∂log p_t/∂z = 1_t − p and ∂H/∂z = −p·(log p + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        chunk: int,
        beside: Beside,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        normalisers = torch.empty_like(logprobs)
        second = logprobs.new_empty(0 if beside == "nothing" else len(hidden))
        for part in _chunks(len(hidden), chunk):
            logits = _logits(hidden[part], weight, temperature)
            normaliser = logits.logsumexp(-1)
            chosen = logits.gather(-1, targets[part, None])[:, 0]
            logprobs[part] = chosen - normaliser
            normalisers[part] = normaliser
            if beside == "entropy":
                mean_logit = torch.linalg.vecdot(logits.sub(normaliser[:, None]).exp_(), logits)
                second[part] = normaliser - mean_logit
            elif beside == "collision":
                second[part] = logits.mul_(2).logsumexp(-1) - 2 * normaliser
        ctx.save_for_backward(hidden, weight, targets, normalisers, second)
        ctx.temperature, ctx.chunk = temperature, chunk
        if beside != "entropy":
            ctx.mark_non_differentiable(second)
        return logprobs, second

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, normalisers, entropy = ctx.saved_tensors
        grad_logprobs, grad_entropy = grads
        # Zeros stand for a second output that no loss uses or that has no gradient.
        with_entropy = bool(grad_entropy.any())
        grad_hidden = torch.empty_like(hidden)
        chunks = _chunks(len(hidden), ctx.chunk)
        # Several chunks add up in float32: a sum kept in bfloat16 would lose what each adds.
        wide = len(chunks) > 1 and weight.dtype != torch.float64
        # A head that is not trained, as beside adapters, needs no gradient as large as itself.
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32 if wide else weight.dtype)
        for part in chunks:
            logits = _logits(hidden[part], weight, ctx.temperature)
            log_p = logits.sub_(normalisers[part, None])
            p = log_p.exp() if with_entropy else log_p.exp_()
            if with_entropy:
                factor = log_p.add_(entropy[part, None]).mul_(grad_entropy[part, None]).add_(grad_logprobs[part, None])
                grad = p.mul_(factor.neg_())
            else:
                grad = p.mul_(-grad_logprobs[part, None])
            grad.scatter_add_(-1, targets[part, None], grad_logprobs[part, None].to(grad.dtype))
            grad = grad.div_(ctx.temperature).to(weight.dtype)
            grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = hidden @ weight.T
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return logits if temperature == 1.0 else logits / temperature


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]
