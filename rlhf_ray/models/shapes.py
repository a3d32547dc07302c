"""The shape of a model: every tensor it has, from its config.json alone.

Nothing of torch or transformers is imported: a shape is there at once, and weights are never opened. Tensors have the
names and shapes that transformers 5 gives them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

Head = Literal["vocabulary", "scalar"]


class ShapeError(Exception):
    """The shape of a model can't be told, or does not allow what is asked of it.

    Attributes:
        subject: the model or the config's key that is the reason.
        reason: what is wrong with it, and the cure.
    """

    def __init__(self, subject: str, reason: str) -> None:
        self.subject, self.reason = subject, reason
        super().__init__(f"{subject}: {reason}")

    def __reduce__(self) -> tuple[type["ShapeError"], tuple[str, str]]:
        return type(self), (self.subject, self.reason)


@dataclass(frozen=True)
class Family:
    """What the models of one `model_type` have in common, where their config.json doesn't say.

    Attributes:
        norms: weights of normalisation `[hidden]` in a layer.
        qk_norm: queries and keys are normalised, with one weight `[head size]` each.
        qkv_bias, o_bias, mlp_bias: of the linear layers; a word is the key of the config that says so.
        kv_heads, head_dim, tied: defaults of `num_key_value_heads` (None: as many as heads), `head_dim` (None: hidden
            size / heads) and `tie_word_embeddings`.
        experts_key: of the config, names the number of experts; None for a dense model.
        shared_expert: beside the experts that a router chooses, each token goes through one more.
        norm_in_float32: a normalisation multiplies by its weight before it rounds to the model's own format.
    """

    norms: int = 2
    qk_norm: bool = False
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    experts_key: str | None = None
    shared_expert: bool = False
    norm_in_float32: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(kv_heads=8),
    "qwen2": Family(qkv_bias=True, kv_heads=32),
    "qwen3": Family(qk_norm=True, qkv_bias="attention_bias", o_bias="attention_bias", kv_heads=32, head_dim=128),
    "gemma": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", kv_heads=16, head_dim=256, tied=True, norm_in_float32=True
    ),
    "gemma3_text": Family(
        norms=4,
        qk_norm=True,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        kv_heads=4,
        head_dim=256,
        tied=True,
        norm_in_float32=True,
    ),
    "mixtral": Family(kv_heads=8, experts_key="num_local_experts"),
    "qwen2_moe": Family(qkv_bias="qkv_bias", kv_heads=16, experts_key="num_experts", shared_expert=True),
    "qwen3_moe": Family(
        qk_norm=True, qkv_bias="attention_bias", o_bias="attention_bias", kv_heads=4, experts_key="num_experts"
    ),
}
"""By `model_type`. Defaults are those of transformers' config classes; a test compares them."""

FLAG_DEFAULTS = {"qkv_bias": True}
"""Of keys that are named above and that are not false where a config leaves them out."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward layer.

    Attributes:
        number: of experts in a layer.
        per_token: that a token goes through.
        intermediate: size inside one.
        shared_intermediate: size inside the expert that all tokens go through; 0 for none.
    """

    number: int
    per_token: int
    intermediate: int
    shared_intermediate: int = 0


@dataclass(frozen=True)
class Tensor:
    """One weight of the model, or the same one of several layers.

    Attributes:
        name: as transformers has it; within the layer for those of layers, such as `self_attn.q_proj.weight`.
        shape: of one.
        layers: how many layers have it; 0 for a weight outside of the layers, of which there is one.
        linear: the weight of an `nn.Linear`, which can have an adapter; `[out, in]`.
        active: share of it that one token passes through; less than 1 for experts.
    """

    name: str
    shape: tuple[int, ...]
    layers: int = 0
    linear: bool = False
    active: float = 1.0

    @property
    def size(self) -> int:
        """Elements of one."""
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        """How many of them the model has."""
        return self.layers or 1


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder and of the head on it.

    Attributes:
        model: folder or hub name it was read from.
        model_type: of transformers.
        hidden: size of the hidden states.
        intermediate: size inside a dense feed-forward layer.
        heads, kv_heads, head_dim: of attention.
        vocab: rows of the embedding.
        tied: the vocabulary head is the embedding.
        positions: tokens that it has positions for, None when its config does not say.
        head: what the model ends in. A scalar head is `[1, hidden]`.
        family: what its type adds.
        qkv_bias, o_bias, mlp_bias: whether these linear layers have one.
        experts: of its sparse layers, None for a dense model.
        dense_layers: layers with a dense feed-forward layer.
        dtype: number format that its weights are saved in.
    """

    model: str
    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    positions: int | None
    head: Head
    family: Family
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    experts: Experts | None
    dense_layers: int
    dtype: str

    @classmethod
    def of(cls, config: Mapping[str, Any], model: str) -> "ModelShape":
        """From the content of a config.json.

        Raises:
            ShapeError: for an architecture that is not known, or a key that is missing or no number.
        """
        read = _Reader(config, model)
        model_type = str(config.get("model_type"))
        if model_type not in FAMILIES:
            raise ShapeError(
                f"model {model!r}",
                f"the planner does not know model_type {model_type!r} (known: {', '.join(FAMILIES)}), so it can't tell "
                "what its layers are made of; `rlhf-ray train` may still run it",
            )
        family = FAMILIES[model_type]
        heads, hidden, layers = (read.size(key) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
        experts, dense = _experts(read, family, layers)
        classifier = any("SequenceClassification" in name for name in config.get("architectures") or [])
        return cls(
            model=model,
            model_type=model_type,
            layers=layers,
            hidden=hidden,
            intermediate=read.size("intermediate_size"),
            heads=heads,
            kv_heads=read.size("num_key_value_heads", family.kv_heads or heads),
            head_dim=read.size("head_dim", family.head_dim or hidden // heads),
            vocab=read.size("vocab_size"),
            tied=bool(config.get("tie_word_embeddings", family.tied)),
            positions=config.get("max_position_embeddings"),
            head="scalar" if classifier else "vocabulary",
            family=family,
            qkv_bias=read.flag(family.qkv_bias),
            o_bias=read.flag(family.o_bias),
            mlp_bias=read.flag(family.mlp_bias),
            experts=experts,
            dense_layers=dense,
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        )

    def with_head(self, head: Head) -> "ModelShape":
        """The same decoder with another head, as a critic has that starts from a language model."""
        return replace(self, head=head)

    @cached_property
    def parameters(self) -> int:
        """All weights; a tied head counts once."""
        return sum(tensor.size * tensor.count for tensor in self.tensors())

    @property
    def active_parameters(self) -> int:
        """Weights that one token passes through: of experts only those it is sent to."""
        return sum(round(tensor.size * tensor.active) * tensor.count for tensor in self.tensors())

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding."""
        return self.vocab * self.hidden

    @property
    def head_parameters(self) -> int:
        """Weights of the head, those of a tied one too."""
        return self.hidden * (self.vocab if self.head == "vocabulary" else 1)

    @property
    def kinds(self) -> dict[bool, int]:
        """How many layers there are without experts (False) and with them (True), as far as there are any."""
        counts = {False: self.dense_layers, True: self.layers - self.dense_layers}
        return {sparse: count for sparse, count in counts.items() if count}

    def tensors(self) -> Iterator[Tensor]:
        """Every weight, those of layers once for each kind of layer."""
        yield Tensor("embed_tokens.weight", (self.vocab, self.hidden))
        for sparse, layers in self.kinds.items():
            for tensor in self.layer_tensors(sparse):
                yield replace(tensor, layers=layers)
        yield Tensor("norm.weight", (self.hidden,))
        if self.head == "scalar":
            yield Tensor("score.weight", (1, self.hidden))
        elif not self.tied:
            yield Tensor("lm_head.weight", (self.vocab, self.hidden))

    def layer_tensors(self, sparse: bool) -> Iterator[Tensor]:
        """Weights of one layer; `sparse` has experts."""
        yield from self._attention()
        if sparse:
            yield from self._mixture()
        else:
            yield from _mlp("mlp", self.hidden, self.intermediate, bias=self.mlp_bias)
        for number in range(self.family.norms):
            yield Tensor(f"norm_{number}.weight", (self.hidden,), 1)

    def _attention(self) -> Iterator[Tensor]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield from _linear("self_attn.q_proj", queries, self.hidden, bias=self.qkv_bias)
        yield from _linear("self_attn.k_proj", keys, self.hidden, bias=self.qkv_bias)
        yield from _linear("self_attn.v_proj", keys, self.hidden, bias=self.qkv_bias)
        yield from _linear("self_attn.o_proj", self.hidden, queries, bias=self.o_bias)
        if self.family.qk_norm:
            yield Tensor("self_attn.q_norm.weight", (self.head_dim,), 1)
            yield Tensor("self_attn.k_norm.weight", (self.head_dim,), 1)

    def _mixture(self) -> Iterator[Tensor]:
        experts = self.experts
        assert experts is not None
        active = experts.per_token / experts.number
        yield Tensor("mlp.gate.weight", (experts.number, self.hidden), 1)
        inner = experts.intermediate
        yield Tensor("mlp.experts.gate_up_proj", (experts.number, 2 * inner, self.hidden), 1, active=active)
        yield Tensor("mlp.experts.down_proj", (experts.number, self.hidden, inner), 1, active=active)
        if experts.shared_intermediate:
            yield from _mlp("mlp.shared_expert", self.hidden, experts.shared_intermediate, bias=False)
            yield from _linear("mlp.shared_expert_gate", 1, self.hidden, bias=False)


def can_share_heads(shape: ModelShape, ranks: int) -> bool:
    """Whether attention can be divided between so many ranks or workers; several may have the same keys."""
    return heads_can_be_dealt(shape.heads, shape.kv_heads, ranks)


def heads_can_be_dealt(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether so many ranks can have as many heads each, with the keys of these."""
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def _linear(name: str, out: int, into: int, *, bias: bool) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (out, into), 1, linear=True)
    if bias:
        yield Tensor(f"{name}.bias", (out,), 1)


def _mlp(name: str, hidden: int, intermediate: int, *, bias: bool) -> Iterator[Tensor]:
    yield from _linear(f"{name}.gate_proj", intermediate, hidden, bias=bias)
    yield from _linear(f"{name}.up_proj", intermediate, hidden, bias=bias)
    yield from _linear(f"{name}.down_proj", hidden, intermediate, bias=bias)


@dataclass(frozen=True)
class _Reader:
    config: Mapping[str, Any]
    model: str

    def size(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if value is None:
            raise ShapeError(f"model {self.model!r}", f"its config.json has no {key}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ShapeError(f"model {self.model!r}", f"{key} in its config.json is {value!r}, not a positive number")
        return value

    def flag(self, rule: bool | str) -> bool:
        return rule if isinstance(rule, bool) else bool(self.config.get(rule, FLAG_DEFAULTS.get(rule, False)))


def _experts(read: _Reader, family: Family, layers: int) -> tuple[Experts | None, int]:
    """The experts, and how many layers have none."""
    if family.experts_key is None:
        return None, layers
    # Both names are in use: transformers 5 saves num_local_experts where a hub's config has num_experts.
    keys = {family.experts_key, "num_local_experts", "num_experts"}
    number = next((read.config[key] for key in sorted(keys) if read.config.get(key) is not None), None)
    if number == 0:
        return None, layers
    if number is None:
        raise ShapeError(f"model {read.model!r}", f"its config.json has no {family.experts_key}")
    inner = "moe_intermediate_size" if family.experts_key == "num_experts" else "intermediate_size"
    experts = Experts(
        number=number,
        per_token=read.size("num_experts_per_tok"),
        intermediate=read.size(inner),
        shared_intermediate=read.size("shared_expert_intermediate_size") if family.shared_expert else 0,
    )
    step = read.config.get("decoder_sparse_step") or 1
    dense = set(read.config.get("mlp_only_layers") or ())
    dense |= {layer for layer in range(layers) if (layer + 1) % step}
    return experts, len(dense & set(range(layers)))
