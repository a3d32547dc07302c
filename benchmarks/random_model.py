"""A Llama of any shape with random weights, for a look at other sizes than that of the prepared models.

`python -m benchmarks.random_model OUT` writes a model folder of 0.58 billion parameters.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import ROOT, run_command
from rlhf_ray.models.heads import load_tokenizer


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    hidden: Annotated[int, typer.Option(min=64, help="Size of the hidden states; heads have 64.")] = 1536,
    layers: Annotated[int, typer.Option(min=1)] = 20,
    intermediate: Annotated[int, typer.Option(min=64, help="Size inside the feed-forward layers.")] = 4096,
    tokenizer: Annotated[Path, typer.Option(help="Model folder to take the tokenizer from.", exists=True)] = ROOT
    / "models"
    / "smollm2-135m",
) -> None:
    """Write a Llama with random weights, in bfloat16."""
    vocabulary = load_tokenizer(str(tokenizer))
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        tie_word_embeddings=True,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(out)
    vocabulary.save_pretrained(out)
    typer.echo(f"{out}: {model.num_parameters() / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    run_command(main)
