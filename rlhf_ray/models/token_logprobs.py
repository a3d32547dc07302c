"""Log-probabilities at chosen positions, without the logits of all of them at once."""

from typing import Any, Literal

import torch
from torch import nn

# What is measured of each distribution beside the log-prob of the target; each takes a pass over the logits.
Beside = Literal["entropy", "collision", "nothing"]

_TILE = 128
"""The width of a block that is wider is a multiple of it, as tensor cores take matrices in tiles."""


class TokenLogProbs(nn.Module):
    """The vocabulary head of a causal model, applied to a block of the vocabulary at a time.

    Logits `[positions, block]` are made, reduced and dropped; the backward pass makes them again. A block is so large
    that there are never more logits than `chunk_tokens` positions have, however many positions there are.

    Args:
        head: the linear layer, without a bias.
        chunk_tokens: see above.
        token_ids: how many ids a token can have, from 0. Probabilities are over these alone, as if the rows behind
            them, which pad the vocabulary of many models, were not there. All rows by default.
    """

    def __init__(self, head: nn.Module, chunk_tokens: int, token_ids: int | None = None) -> None:
        super().__init__()
        self.chunk_tokens, self.token_ids = chunk_tokens, token_ids
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
        weight = self.weight
        ids = len(weight) if self.token_ids is None else min(self.token_ids, len(weight))
        size = max(1, ids * self.chunk_tokens // max(1, len(hidden)))
        size -= size % _TILE if size > _TILE else 0
        blocks = [slice(start, min(start + size, ids)) for start in range(0, ids, size)]
        out = _BlockwiseLogProbs.apply(hidden, weight, targets, temperature, blocks, beside)
        return out


class _BlockwiseLogProbs(torch.autograd.Function):
    """With p = softmax(z), H = −Σ p log p: ∂log p_t/∂z = 1_t − p and ∂H/∂z = −p·(log p + H).

    Sums over the vocabulary are put together from those of its blocks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        blocks: list[slice],
        beside: Beside,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        # Sums of exp(z − peak), whose rounding is relative to them; adding up logarithms would lose digits by block.
        peak, total = torch.full_like(chosen, -torch.inf), torch.zeros_like(chosen)
        weighted = squares = total
        for block in blocks:
            logits = _logits(hidden, weight[block], temperature)
            inside, places = _within(block, targets)
            chosen = torch.where(inside, logits.gather(-1, places)[:, 0], chosen)
            before, peak = peak, torch.maximum(peak, logits.amax(-1))
            shrunk = (before - peak).exp()
            parts = logits.sub(peak[:, None]).exp_()
            total = total * shrunk + parts.sum(-1)
            if beside == "entropy":
                weighted = weighted * shrunk + torch.linalg.vecdot(parts, logits)
            elif beside == "collision":
                squares = squares * shrunk.square() + torch.linalg.vecdot(parts, parts)
        normaliser = peak + total.log()
        second = normaliser.new_empty(0)
        if beside == "entropy":
            second = normaliser - weighted / total
        elif beside == "collision":
            second = squares.log() - 2 * total.log()
        ctx.save_for_backward(hidden, weight, targets, normaliser, second)
        ctx.temperature, ctx.blocks = temperature, blocks
        ctx.set_materialize_grads(False)
        if beside != "entropy":
            ctx.mark_non_differentiable(second)
        return chosen - normaliser, second

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        # None stands for an output that no loss uses or that has no gradient.
        by_logprobs, by_entropy = (None if grad is None else grad[:, None] / ctx.temperature for grad in grads)
        if by_logprobs is None:
            by_logprobs = torch.zeros_like(normaliser)[:, None]
        by_hidden = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
        # A head that is not trained, as beside adapters, needs no gradient as large as itself.
        by_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if by_weight is not None:
            by_weight[ctx.blocks[-1].stop :] = 0  # rows of no token
        for block in ctx.blocks:
            log_p = _logits(hidden, weight[block], ctx.temperature).sub_(normaliser[:, None])
            if by_entropy is not None:
                p = log_p.exp()
                by_logits = log_p.add_(entropy[:, None]).mul_(by_entropy).add_(by_logprobs).mul_(p).neg_()
            else:
                by_logits = log_p.exp_().mul_(-by_logprobs)
            inside, places = _within(block, targets)
            by_logits.scatter_add_(-1, places, torch.where(inside[:, None], by_logprobs, 0).to(by_logits.dtype))
            by_logits = by_logits.to(weight.dtype)
            by_hidden += by_logits @ weight[block]
            if by_weight is not None:
                torch.mm(by_logits.T, hidden, out=by_weight[block])
        return by_hidden.to(hidden.dtype), by_weight, None, None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = hidden @ weight.T
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return logits if temperature == 1.0 else logits / temperature


def _within(block: slice, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which targets lie in a block of the vocabulary, `[positions]`, and where, `[positions, 1]`: 0 for the others."""
    inside = (targets >= block.start) & (targets < block.stop)
    return inside, torch.where(inside, targets - block.start, 0)[:, None]
