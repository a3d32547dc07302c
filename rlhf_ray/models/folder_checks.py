"""What can be known to be wrong with a model folder before a model is loaded from it.

The config is held against the headers of the weight files, and an export is tried with a model that has no weights. No
tensor is read, so that a model of any size takes a second or two.
"""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from rlhf_ray.models.heads import (
    ModelError,
    check_architecture,
    check_one_label,
    empty_model,
    is_classifier,
    load_config,
    load_tokenizer,
    one_line,
)
from rlhf_ray.models.saving import generation_config_fault, save_model
from rlhf_ray.models.stored_weights import StoredWeights

logger = logging.getLogger("rlhf_ray")


def check_model(model: str, *, scalar: bool, sharded: bool, trust_remote_code: bool = False) -> None:
    """A role's model must be one that can be built, run packed and filled from the files of its folder.

    The files of a model on the hub are not looked at: they are fetched when it is loaded.

    Args:
        scalar: it gets, or has, a head with one label.
        sharded: it is read a part at a time, which quantized weights can't be.

    Raises:
        ModelError: naming what is wrong, and with which file or tensor.
    """
    config = load_config(model, trust_remote_code=trust_remote_code)
    is_new = scalar and not is_classifier(config)
    if scalar:
        check_one_label(model, config)
    empty = empty_model(model, scalar=scalar, dtype=torch.float32, trust_remote_code=trust_remote_code)
    check_architecture(empty, model, scalar=scalar)
    # Stored codes have other shapes than the weights that they stand for.
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized and sharded:
        raise ModelError(model, "its weights are quantized, which zero_stage: 3 does not load")
    if quantized or not Path(model).is_dir():
        return
    try:
        stored = StoredWeights(model, empty, headers_only=True, any_format=not sharded)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(model, one_line(error)) from error
    lacks = [name for name, _ in empty.named_parameters() if name not in stored]
    lacks = [name for name in lacks if not (is_new and name == "score.weight")]
    if lacks:
        more = f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""
        raise ModelError(
            model,
            f"its files lack {', '.join(lacks[:3])}{more}: copy the folder again, or take the config.json that belongs "
            "to them",
        )


@dataclass(frozen=True)
class Positions:
    """How long a sequence a model is made for.

    Attributes:
        tokens: of the longest one.
        in_table: each position has a row in a table, so that a longer sequence can't be computed. Other models, such as
            those with rotary embeddings, compute something, but have not learnt it.
    """

    tokens: int
    in_table: bool


def positions_of(model: str, *, trust_remote_code: bool = False) -> Positions | None:
    """The positions that a causal model or classifier has, None when its config does not say.

    Raises:
        ModelError: the folder can't be used.
    """
    config = load_config(model, trust_remote_code=trust_remote_code)
    tokens = getattr(config.get_text_config(), "max_position_embeddings", None)
    if tokens is None:
        return None
    empty = empty_model(model, scalar=is_classifier(config), dtype=torch.float32, trust_remote_code=trust_remote_code)
    return Positions(tokens, _has_position_table(empty))


def _has_position_table(model: PreTrainedModel) -> bool:
    return any(
        isinstance(module, nn.Embedding) and any(part in name.rpartition(".")[2] for part in ("pos", "wpe"))
        for name, module in model.named_modules()
    )


def try_export(model: str, *, scalar: bool, trust_remote_code: bool = False) -> None:
    """Write all that an export has, but for one number in place of the weights, and throw it away.

    Raises:
        ModelError: what an export after the last step would fail with.
    """
    empty = empty_model(model, scalar=scalar, dtype=torch.float32, trust_remote_code=trust_remote_code)
    read_generation_config(empty, model)
    fault = generation_config_fault(empty)
    if fault is not None:
        logger.info("model %r: its %s goes into exports as it is, though %s", model, GENERATION_CONFIG_NAME, fault)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-export-") as scratch:
        folder = Path(scratch)
        try:
            save_model(empty, folder, weights={})
            save_file({"weight": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
            tokenizer.save_pretrained(folder)
        except Exception as error:  # whatever it is, the run would end with it
            raise ModelError(
                model, f"what is trained from it could not be exported ({one_line(error)}): mend its files first"
            ) from error


def read_generation_config(empty: PreTrainedModel, model: str) -> None:
    """Give a model that was made from its config alone the generation config of its folder, if that has one.

    Raises:
        ModelError: it can't be read.
    """
    if not empty.can_generate():
        return
    try:
        empty.generation_config = GenerationConfig.from_pretrained(model)
    except Exception as error:  # whatever transformers stumbles over is a fault of the folder, but for a missing file
        if not isinstance(error, OSError) or (Path(model) / GENERATION_CONFIG_NAME).is_file():
            raise ModelError(model, f"its {GENERATION_CONFIG_NAME} can't be read ({one_line(error)})") from error
