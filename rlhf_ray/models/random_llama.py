"""Llamas of any size with random weights: what is measured with them depends on their shape alone."""

from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.models.tiny import CORPUS, train_tokenizer, write_llama


@dataclass(frozen=True)
class LlamaSize:
    """Sizes of a Llama whose heads have 64 elements and whose keys and values have a quarter of the heads.

    Attributes:
        hidden: a multiple of 256.
    """

    hidden: int
    layers: int
    intermediate: int
    vocab: int


def write_random_llama(folder: Path, size: LlamaSize) -> Path:
    """Write a model folder, in bfloat16, with a tokenizer that knows the first few tokens. Returns `folder`."""
    return write_llama(
        folder,
        train_tokenizer(512, CORPUS),
        dtype="bfloat16",
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 256,
        max_position_embeddings=4096,
    )
