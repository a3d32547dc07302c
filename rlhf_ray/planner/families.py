"""Families of models: what their config.json leaves unsaid."""

from collections.abc import Mapping
from dataclasses import dataclass


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

DEFAULTS = {"qkv_bias": True}
"""Of keys that are named above and that are not false where a config leaves them out."""
