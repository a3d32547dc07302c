"""The config.json of a model folder, of a file, or of a name on the hub; of a few public models its values are here."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_ray.data.rows import kind_of
from rlhf_ray.models.shapes import ModelShape, ShapeError


@cache
def read_shape(model: str) -> ModelShape:
    """The shape of a model: a folder with a config.json, such a file itself, or a name on the hub; for a few public
    models the name alone does.

    Raises:
        ShapeError: when there is no such file, it can't be read or fetched, or the architecture is not known.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ShapeError(f"model {model!r}", "the folder has no config.json, so it is no Hugging Face model")
    elif model in PUBLIC_MODELS:
        return ModelShape.of(PUBLIC_MODELS[model], model)
    elif not path.is_file():
        path = _from_hub(model)
    return ModelShape.of(read_config(path, model), model)


def read_config(path: Path, model: str) -> dict[str, Any]:
    """The content of a config.json.

    Raises:
        ShapeError: it can't be read, or is no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ShapeError(f"model {model!r}", f"its config.json can't be read as JSON ({error})") from error
    if not isinstance(content, dict):
        reason = f"its config.json holds {kind_of(content)}, not an object with the keys of a model"
        raise ShapeError(f"model {model!r}", reason)
    return content


def _from_hub(model: str) -> Path:
    from rlhf_ray.data.hub import may_be_on_hub, reach_hub

    if not may_be_on_hub(model):
        raise ShapeError(
            f"model {model!r}",
            "no such folder; `rlhf-ray prepare` makes the ones that the examples use. A folder that holds nothing but "
            "the model's config.json is enough to plan",
        )
    from huggingface_hub import hf_hub_download

    reached = reach_hub()
    try:
        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:  # the hub's client raises a dozen kinds, and those of the libraries beneath it
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        first = first if reached else "it does not answer"
        raise ShapeError(
            f"model {model!r}",
            f"there is no such folder, and its config.json can't be had from the hub ({first}): check the name and the "
            "network, or name a folder that holds its config.json",
        ) from error


_LLAMA_3_8B = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
_LLAMA_3_70B = {
    **_LLAMA_3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
_QWEN3_8B = {
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
}
_QWEN3_32B = {
    **_QWEN3_8B,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_attention_heads": 64,
    "num_hidden_layers": 64,
}
_QWEN3_30B_A3B = {
    **_QWEN3_8B,
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
}
_MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "vocab_size": 32000,
}

PUBLIC_MODELS: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-70B": _LLAMA_3_70B,
    "meta-llama/Meta-Llama-3-70B-Instruct": _LLAMA_3_70B,
    "mistralai/Mixtral-8x7B-v0.1": _MIXTRAL_8X7B,
    "Qwen/Qwen3-8B": _QWEN3_8B,
    "Qwen/Qwen3-30B-A3B": _QWEN3_30B_A3B,
    "Qwen/Qwen3-32B": _QWEN3_32B,
}
"""By name on the hub."""
