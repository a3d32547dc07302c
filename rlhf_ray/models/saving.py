"""A model as Hugging Face files, also where transformers loads what it then refuses to save."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME


def save_model(model: PreTrainedModel, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write config, generation config and weights.

    A generation config that transformers calls invalid, such as one with a `temperature` but without `do_sample` (as
    Llama 2 came with), is carried over as it was: it takes nothing from the weights.

    Args:
        weights: all of them, by name; by default those that the model holds. With none, no file is made for them.
    """
    given = None if weights is None else dict(weights)
    fault = generation_config_fault(model)
    if fault is None:
        model.save_pretrained(folder, state_dict=given)
        return
    carried: GenerationConfig = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=given)
    finally:
        model.generation_config = carried
    carried.to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True, keys_to_pop=["compile_config"])


def generation_config_fault(model: PreTrainedModel) -> str | None:
    """What transformers has against saving the generation config, None for nothing."""
    if not model.can_generate():
        return None
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None
