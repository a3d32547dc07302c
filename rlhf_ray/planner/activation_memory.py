"""Memory of one forward and backward pass over a pack of tokens, from the shape of the model.

What autograd keeps for the backward pass is counted tensor by tensor, as transformers' layers and ours of
`rlhf_ray.models` make them; a test compares it with what torch really saves. What comes and goes within a layer or
within the vocabulary head is counted where it is largest.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_ray.config.training import Dtype
from rlhf_ray.models.shapes import ModelShape
from rlhf_ray.planner.work import BYTES

FLOAT32 = 4
INT64 = 8
SMALL = 16 * 2**10
"""Bytes up to which jemalloc's sizes are not worth counting."""


@dataclass(frozen=True)
class Pack:
    """The largest micro-batch.

    Attributes:
        tokens: in it.
        positions: of them, at which the head is applied.
    """

    tokens: int
    positions: int


@dataclass(frozen=True)
class PassShape:
    """How a model computes.

    Attributes:
        shape: of the model.
        dtype: of weights and activations.
        cpu: attention gathers its states and its result once more there (`models/attention.py`).
        checkpointing: activations are recomputed layer by layer.
        vocab_chunk_tokens: of the config.
        entropy: the loss has an entropy bonus, so the head's backward pass holds probabilities too.
        sequence_parallel: ranks that share a pack; with more of them than heads of keys, some have the same.
        adapter_rank: of LoRA, beside which all else is frozen; 0 without.
        adapted: names, within a layer, of the linear layers that have adapters.
    """

    shape: ModelShape
    dtype: Dtype
    cpu: bool
    checkpointing: bool = False
    vocab_chunk_tokens: int = 256
    entropy: bool = False
    sequence_parallel: int = 1
    adapter_rank: int = 0
    adapted: frozenset[str] = frozenset()

    @property
    def item(self) -> int:
        """Bytes of one number."""
        return BYTES[self.dtype]

    def saved_bytes(self, tokens: int) -> int:
        """What autograd keeps of all layers until their backward pass."""
        return sum(size * count for size, count in self._saved(tokens))

    def held_bytes(self, tokens: int) -> int:
        """Memory that this takes: on the CPU tensors take the next larger size of jemalloc."""
        return sum((size_class(size) if self.cpu else size) * count for size, count in self._saved(tokens))

    def _saved(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Bytes of each tensor, and how many there are of it."""
        for of_token in self._norm(self.shape.hidden):
            yield of_token * tokens, 1
        if self.checkpointing:
            yield self.item * self.shape.hidden * tokens, self.shape.layers
            return
        for sparse, layers in self.shape.kinds.items():
            for of_token in self.layer_tensors(sparse):
                yield of_token * tokens, layers

    def layer_tensors(self, sparse: bool) -> list[int]:
        """What autograd keeps of one layer: bytes of each tensor for each token."""
        norms = self._norm(self.shape.hidden) * self.shape.family.norms
        feed_forward = self._mixture() if sparse else self._feed_forward("mlp", self.shape.intermediate)
        adapters = [self.item * self.adapter_rank] * len(self.adapted)
        return [*norms, *self._attention(), *feed_forward, *adapters]

    def working_bytes(self, tokens: int) -> int:
        """What comes and goes in the backward pass of one layer, beside what autograd kept of it."""
        shape, item = self.shape, self.item
        # Gradients of the feed-forward layer's product and of its factors, less the product itself; or, at a
        # normalisation, float32 copies of what goes in and comes out.
        feed_forward = 2 * item * widest(shape) + 2 * item * shape.hidden
        norm = (4 * FLOAT32 + item) * shape.hidden
        recomputed = max(sum(self.layer_tensors(sparse)) for sparse in shape.kinds)
        return (max(feed_forward, norm) + (recomputed if self.checkpointing else 0)) * tokens

    def forward_bytes(self, tokens: int) -> int:
        """What comes and goes in a forward pass without gradients."""
        shape, item = self.shape, self.item
        feed_forward = 2 * item * shape.hidden + 3 * item * widest(shape)
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        attention = 2 * item * shape.hidden + item * (2 * queries + 2 * keys) * (2 if self.cpu else 1)
        norm = (item + 2 * FLOAT32 + item) * shape.hidden
        return max(feed_forward, attention, norm) * tokens

    def head_bytes(self, pack: Pack, *, backward: bool) -> int:
        """States and logits of the vocabulary head, where they are most: in its backward pass, or without one."""
        shape, item = self.shape, self.item
        states = item * shape.hidden * pack.tokens + item * shape.hidden * pack.positions
        if shape.head == "scalar":
            return states
        chunk = min(self.vocab_chunk_tokens, pack.positions)
        blocks = -(-pack.positions // self.vocab_chunk_tokens)
        raw = item if self.dtype == "bfloat16" else 0  # logits as they come out of the product
        # Names of one block are held until those of the next replace them.
        forward = FLOAT32 * 2 + (raw + FLOAT32 if blocks > 1 else 0)
        if not backward:
            return states + forward * chunk * shape.vocab
        copies = (2 if self.entropy else 1) * FLOAT32 + raw
        by_logits = copies + (raw + FLOAT32 if blocks > 1 else 0)
        by_hidden = (FLOAT32 + item) * shape.hidden * pack.positions
        return states + by_hidden + max(forward, by_logits) * chunk * shape.vocab

    def _keeps_input(self, *layers: str) -> bool:
        """Whether what goes into these linear layers is kept: the gradient of a weight needs it."""
        return not self.adapter_rank or any(layer in self.adapted for layer in layers)

    def _norm(self, width: int) -> list[int]:
        """Of RMSNorm on `width` numbers: what it squares, in float32, a factor, and what its weight multiplies."""
        normalised = FLOAT32 if self.shape.family.norm_in_float32 else self.item
        return [FLOAT32 * width, FLOAT32, *([] if self.adapter_rank else [normalised * width])]

    def _attention(self) -> list[int]:
        shape, item = self.shape, self.item
        queries, keys = shape.heads * shape.head_dim, max(shape.kv_heads, self.sequence_parallel) * shape.head_dim
        kept = [item * queries, item * keys, item * keys, item * queries, FLOAT32 * shape.heads]
        if self._keeps_input("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            kept.append(item * shape.hidden)
        if self.cpu and self._keeps_input("self_attn.o_proj"):
            kept.append(item * queries)  # the result in the order of the tokens
        if shape.family.qk_norm:
            for heads in (shape.heads, shape.kv_heads):
                kept += [heads * of_head for of_head in self._norm(shape.head_dim)]
        return kept

    def _feed_forward(self, name: str, inner: int) -> list[int]:
        """Gate, its activation, and what that is multiplied with; then the product."""
        kept = [self.item * inner] * 3
        if self._keeps_input(f"{name}.gate_proj", f"{name}.up_proj"):
            kept.append(self.item * self.shape.hidden)
        if self._keeps_input(f"{name}.down_proj"):
            kept.append(self.item * inner)
        return kept

    def _mixture(self) -> list[int]:
        shape, item, experts = self.shape, self.item, self.shape.experts
        assert experts is not None
        inner, each = item * experts.intermediate, experts.per_token
        # Gate and up together, the activation, the result, its weight, and three orders of the tokens.
        routed = [2 * inner, inner, item * shape.hidden, item, INT64, INT64, INT64]
        router = [FLOAT32 * experts.number, INT64 * each]
        if not self.adapter_rank:
            routed += [item * shape.hidden, inner]
            router.append(item * shape.hidden)
        kept = [each * of_token for of_token in routed] + router
        if experts.shared_intermediate:
            # What all experts read is kept once; then the result of the shared one, and its gate.
            kept += [*self._feed_forward("mlp.shared_expert", experts.shared_intermediate), item]
            kept += [item * shape.hidden] if self.adapter_rank else []
        return kept


def widest(shape: ModelShape) -> int:
    """Numbers inside the widest feed-forward layer, for each token."""
    inner = shape.intermediate if shape.dense_layers else 0
    if shape.experts is None:
        return inner
    return max(inner, shape.experts.intermediate * shape.experts.per_token + shape.experts.shared_intermediate)


def size_class(size: int) -> int:
    """What jemalloc gives for so many bytes: sizes grow by a quarter of the power of two below."""
    if size <= SMALL:
        return size
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step
