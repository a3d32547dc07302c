"""What a model must compute for some sequences: operations and bytes, whatever the machine."""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

from rlhf_ray.config.training import Dtype, Lora
from rlhf_ray.models.lora_sizes import adapter_sizes
from rlhf_ray.models.shapes import ModelShape

BYTES: dict[Dtype, int] = {"bfloat16": 2, "float32": 4}
_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, are spread evenly
# DeepSpeed's defaults, in elements (runtime/zero/config.py): weights that stage 3 keeps whole, and gradients that are
# reduced together.
PERSISTENT = 10_000
REDUCE_BUCKET = 500_000_000

# Tensors that are read or written for each token in a layer, counted in transformers' Llama; factors of a calibration
# are relative to these, so that only their proportions matter.
_HIDDEN_MOVES = 24  # two norms in float32, two residual sums
_INNER_MOVES = 5  # SiLU and the product with the gate
_HEAD_MOVES = 8  # rotations, and what attention gathers
_LOGIT_MOVES = 8  # of float32 logits in a softmax: peak, difference, exponential, sums


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and responses. Each token of a response is the last with the same probability, until the
    longest response is cut off.

    Attributes:
        prompt: mean of prompts.
        response: mean of responses; at least `longest` means that all are that long.
        longest: response.
    """

    prompt: float
    response: float
    longest: int

    def responses(self, number: int) -> list[float]:
        """Lengths of so many responses: evenly spaced quantiles, in an order that is as mixed as chance."""
        ending = self._ending
        shares = ((0.5 + place * _GOLDEN) % 1.0 for place in range(number))
        return [min(self.longest, -math.log1p(-share) / ending) if ending else self.longest for share in shares]

    @property
    def _ending(self) -> float:
        """Rate at which responses end by themselves, for which their mean is right."""
        if self.response >= self.longest:
            return 0.0
        low, high = 0.0, 1.0 / self.response  # at the upper end the mean would be right without a cut
        for _ in range(60):
            middle = (low + high) / 2
            mean = -math.expm1(-middle * self.longest) / middle
            low, high = (middle, high) if mean > self.response else (low, middle)
        return (low + high) / 2


@dataclass(frozen=True)
class Sequences:
    """Sequences that go through a model.

    Attributes:
        count: how many.
        tokens: of all of them.
        pairs: of a token with itself or one before it in its sequence.
        scored: tokens whose log-probs or values are asked for.
    """

    count: float
    tokens: float
    pairs: float
    scored: float

    @classmethod
    def of(cls, count: float, unscored: float, scored: float) -> Self:
        """Sequences that are alike, of a prompt and a response for example."""
        length = unscored + scored
        return cls(count, count * length, count * length * (length + 1) / 2, count * scored)

    def __truediv__(self, divisor: float) -> "Sequences":
        return Sequences(self.count / divisor, self.tokens / divisor, self.pairs / divisor, self.scored / divisor)


@dataclass(frozen=True)
class Work:
    """Operations, numbers and bytes.

    Attributes:
        products: operations in products of weights and states, those of the vocabulary head too.
        attention: operations in products of queries, keys and values.
        elementwise: numbers that the other operations of the layers read and write.
        logits: bytes that the softmax over the vocabulary moves.
        weights: numbers of weights that are read and of gradients that are written, in one micro-batch.
    """

    products: float
    attention: float
    elementwise: float
    logits: float
    weights: float


@cache
def gathered_tensors(shape: ModelShape) -> int:
    """Weights that ZeRO-3 shards: all but the small ones."""
    return sum(tensor.count for tensor in shape.tensors() if tensor.size > PERSISTENT)


@cache
def layer_parameters(shape: ModelShape) -> int:
    """Weights of the layers that a token passes through: without embedding and head."""
    head = 0 if shape.tied and shape.head == "vocabulary" else shape.head_parameters
    return shape.active_parameters - shape.embedding_parameters - head


def scoring_work(shape: ModelShape, sequences: Sequences) -> Work:
    """A forward pass with the head at the scored tokens."""
    layers = layers_work(shape, sequences)
    return replace(
        layers,
        products=layers.products + _head_products(shape, sequences),
        logits=_logit_bytes(shape, sequences),
        weights=layers.weights + shape.head_parameters,
    )


def training_work(shape: ModelShape, sequences: Sequences, trained: int) -> Work:
    """A forward and a backward pass: gradients of states, and of weights unless these are frozen beside adapters. The
    vocabulary head makes its logits twice."""
    layers, head = layers_work(shape, sequences), _head_products(shape, sequences)
    times = 3 if trained >= shape.parameters else 2
    again = head if shape.head == "vocabulary" else 0
    return Work(
        products=times * (layers.products + head) + again,
        attention=3 * layers.attention,
        elementwise=3 * layers.elementwise,
        logits=2 * _logit_bytes(shape, sequences),
        weights=2 * shape.parameters + trained,
    )


def layers_work(shape: ModelShape, sequences: Sequences) -> Work:
    """The forward pass of the layers alone, which activation checkpointing repeats: two operations for each weight and
    token (Kaplan et al. 2020, table 1), four for each pair of tokens and element of a query."""
    queries = shape.heads * shape.head_dim
    inner = shape.experts.per_token * shape.experts.intermediate if shape.experts else shape.intermediate
    moved = (
        _HIDDEN_MOVES * shape.hidden
        + _INNER_MOVES * inner
        + _HEAD_MOVES * (queries + 2 * shape.kv_heads * shape.head_dim)
    )
    return Work(
        products=2 * layer_parameters(shape) * sequences.tokens,
        attention=4 * queries * shape.layers * sequences.pairs,
        elementwise=moved * shape.layers * sequences.tokens,
        logits=0,
        weights=shape.parameters - shape.embedding_parameters,
    )


@cache
def adapter_parameters(shape: ModelShape, lora: Lora) -> int:
    """What is trained beside frozen weights."""
    return sum(adapter_sizes(shape, lora))


def cached_bytes(shape: ModelShape, dtype: Dtype, workers: int) -> int:
    """Keys and values of one token in all layers, in one of so many workers. They share the heads; with more workers
    than there are of keys and values, several hold the same."""
    return 2 * shape.layers * max(1, shape.kv_heads // workers) * shape.head_dim * BYTES[dtype]


def touched_parameters(shape: ModelShape, tokens: float) -> float:
    """Weights of layers and head that are read for so many tokens together: of experts those that any is sent to."""
    head = shape.head_parameters
    if shape.experts is None:
        return layer_parameters(shape) + head
    share = shape.experts.per_token / shape.experts.number
    expert = _expert_parameters(shape)
    always = layer_parameters(shape) - expert * share
    missed: float = (1 - share) ** tokens
    return always + head + expert * (1 - missed)


@cache
def _expert_parameters(shape: ModelShape) -> int:
    return sum(tensor.size * tensor.count for tensor in shape.tensors() if tensor.active < 1)


def _head_products(shape: ModelShape, sequences: Sequences) -> float:
    return 2 * shape.head_parameters * sequences.scored


def _logit_bytes(shape: ModelShape, sequences: Sequences) -> float:
    return _LOGIT_MOVES * sequences.scored * shape.vocab * 4 if shape.head == "vocabulary" else 0.0
