"""Ulysses sequence parallelism (Jacobs et al. 2023, arXiv:2309.14509): several ranks compute on one pack.

Each rank holds a slice of the pack's tokens. All layers work on single tokens but attention, for which the ranks trade
tokens for heads: each attends over the whole sequences with its part of the heads. What is measured of single tokens
is small, and joined again before any loss is made of it.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.models.shapes import heads_can_be_dealt


def copies_of_keys(heads: int, kv_heads: int, ranks: int) -> int:
    """How many ranks get each key/value head: with fewer of these than ranks, some get the same one.

    Raises:
        ValueError: the heads can't be dealt evenly; names the numbers of ranks that they can be dealt to.
    """
    if heads_can_be_dealt(heads, kv_heads, ranks):
        return max(1, ranks // kv_heads)
    fitting = [str(count) for count in range(2, heads + 1) if heads_can_be_dealt(heads, kv_heads, count)]
    raise ValueError(
        f"{heads} attention heads and {kv_heads} key/value heads can't be dealt evenly to {ranks} ranks"
        + (f", but to {', '.join(fitting)}" if fitting else "")
    )


@dataclass(frozen=True)
class SequenceParallel:
    """This rank among those that it shares packs with.

    All of them are given the same packs and make the same loss of what `join` gives them. Each rank's backward pass
    gives the part of the gradient that comes from its own tokens, so the sum over the ranks is the gradient of this
    loss, counted once.

    Attributes:
        group: process group of these ranks.
        ranks: their number.
        rank: of this process among them.
    """

    group: dist.ProcessGroup
    ranks: int
    rank: int

    def padded(self, packed: PackedSequences) -> PackedSequences:
        """The pack with slices of one length: where tokens lack, they come as a last sequence that nothing reads."""
        lacking = -packed.input_ids.shape[1] % self.ranks
        if not lacking:
            return packed
        return replace(
            packed,
            input_ids=F.pad(packed.input_ids, (0, lacking)),
            position_ids=F.pad(packed.position_ids, (0, lacking)),
            cu_seqlens=torch.cat([packed.cu_seqlens, packed.cu_seqlens[-1:] + lacking]),
            max_length=max(packed.max_length, lacking),
            prefixes=None if packed.prefixes is None else (*packed.prefixes, (0, 0)),
        )

    def own_slice(self, packed: PackedSequences) -> slice:
        """The tokens of a padded pack that this rank holds."""
        length = packed.input_ids.shape[1] // self.ranks
        return slice(self.rank * length, (self.rank + 1) * length)

    def to_heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From all heads of this rank's tokens, each `[tokens / ranks, heads, size]`, to this rank's heads of all
        tokens, `[tokens, heads / ranks, size]`.

        Raises:
            ValueError: as `copies_of_keys`.
        """
        copies = copies_of_keys(query.shape[1], key.shape[1], self.ranks)
        if copies > 1:
            key, value = (states.repeat_interleave(copies, dim=1) for states in (key, value))
        dealt = [states.unflatten(1, (self.ranks, -1)) for states in (query, key, value)]
        # All three travel at once.
        received = self._exchange(torch.cat([states.flatten(2).transpose(0, 1) for states in dealt], dim=2))
        split = received.flatten(0, 1).split([states[0, 0].numel() for states in dealt], dim=1)
        query, key, value = (mine.unflatten(1, states.shape[2:]) for mine, states in zip(split, dealt, strict=True))
        return query, key, value

    def to_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """The way back: from `[tokens, heads / ranks, size]` to `[tokens / ranks, heads, size]`."""
        received = self._exchange(states.unflatten(0, (self.ranks, -1)).contiguous())
        return received.transpose(0, 1).flatten(1, 2)

    def join(self, values: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """What all ranks measured, `[places]`, from what this one did, `[own places]`; `own` is bool `[places]`."""
        whole: torch.Tensor = _Join.apply(values, own, self.group)
        return whole

    def _exchange(self, parts: torch.Tensor) -> torch.Tensor:
        received: torch.Tensor = _Exchange.apply(parts, self.group)
        return received


# torch.distributed.nn has the same with gradients, deprecated; what it points to instead is a private module.
class _Exchange(torch.autograd.Function):
    """Part i, `[ranks, ...]`, goes to rank i, and what rank i has for this one takes its place. Its own inverse."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        back: torch.Tensor = _Exchange.apply(grads[0].contiguous(), ctx.group)
        return back, None


class _Join(torch.autograd.Function):
    """Each place is one rank's, so a sum puts them together. The gradient of a rank's own places is its own alone."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.save_for_backward(own)
        whole = values.new_zeros(own.shape)
        whole[own] = values
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        [own] = ctx.saved_tensors
        return grads[0][own], None, None
