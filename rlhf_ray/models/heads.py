"""Model folders: what they hold, whether it can be used, and the models that roles make of it."""

import math
from collections.abc import Set
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_ray.config.training import Lora
from rlhf_ray.data.hub import may_be_on_hub, why_no_model
from rlhf_ray.models.attention import PACKED_ATTENTION
from rlhf_ray.models.config_json import read_config
from rlhf_ray.models.lora import adapters_in_memory, add_adapters, missing_package, quantization
from rlhf_ray.models.on_meta import build_on_meta
from rlhf_ray.models.role_models import CausalModel, RoleModel, ScalarModel
from rlhf_ray.models.sequence_parallel import copies_of_keys
from rlhf_ray.models.shapes import ShapeError
from rlhf_ray.models.stored_weights import StoredWeights, check_finite_files, is_finite, not_finite


class ModelError(Exception):
    """A model folder that can't be used.

    Attributes:
        model: the folder or hub name.
        reason: what is wrong with it.
    """

    def __init__(self, model: str, reason: str) -> None:
        self.model, self.reason = model, reason
        super().__init__(f"model {model!r}: {reason}")

    def __reduce__(self) -> tuple[type["ModelError"], tuple[str, str]]:
        # Exceptions leave their actor pickled; the default would call __init__ with the message alone.
        return type(self), (self.model, self.reason)


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        ModelError: when there is none.
    """
    _check_folder(model)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers stumbles over is a fault of the folder
        raise ModelError(model, f"its tokenizer can't be loaded ({one_line(error)})") from error
    return tokenizer


def count_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token ids up to the largest that a tokenizer has. A model's embedding may have more rows, which pad it."""
    return 1 + max(tokenizer.get_vocab().values())


def check_tokenizer_matches(model: str, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False) -> None:
    """Every token id must have a row in the model's embedding.

    Raises:
        ModelError: naming both sizes.
    """
    config = load_config(model, trust_remote_code=trust_remote_code)
    ids = count_ids(tokenizer)
    rows = config.get_text_config().vocab_size
    if ids > rows:
        raise ModelError(
            model,
            f"its tokenizer has token ids up to {ids - 1}, but its embedding has {rows} rows: the "
            "folder holds the tokenizer of another model",
        )


def load_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model folder.

    Raises:
        ModelError: when there is none, or the model can't run packed.
    """
    _check_folder(model)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers stumbles over is a fault of the folder
        raise ModelError(model, f"its config can't be loaded ({one_line(error)})") from error
    _check_sizes(model, config.get_text_config())
    for unsupported in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, unsupported, None) not in (None, 1, 1.0):
            raise ModelError(model, f"{unsupported} in its config is not supported: log-probs would be wrong")
    return config


def longest_sequence(model: str, *, trust_remote_code: bool = False) -> int | None:
    """Tokens that a model has positions for, None when its config does not say."""
    config = load_config(model, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_heads(model: str, ranks: int, *, trust_remote_code: bool = False) -> None:
    """The attention heads of a model must be dealt evenly to the ranks or workers that share them.

    Raises:
        ModelError: naming how many there are, and how many ranks there can be.
    """
    config = load_config(model, trust_remote_code=trust_remote_code).get_text_config()
    heads = config.num_attention_heads
    try:
        copies_of_keys(heads, getattr(config, "num_key_value_heads", None) or heads, ranks)
    except ValueError as error:
        raise ModelError(model, f"its {error}") from error


def check_scores(model: str, *, trust_remote_code: bool = False) -> None:
    """The folder must hold a sequence classifier with one label: a causal model would score with a random head.

    Raises:
        ModelError: naming what it holds.
    """
    config = load_config(model, trust_remote_code=trust_remote_code)
    if not is_classifier(config):
        raise ModelError(
            model,
            f"it is a {', '.join(config.architectures or ['model of unknown type'])}, not a reward model: train one "
            "with job: reward_model",
        )
    check_one_label(model, config)


def check_one_label(model: str, config: Any) -> None:
    """A classifier must have one label.

    Raises:
        ModelError: naming how many it has.
    """
    if is_classifier(config) and config.num_labels != 1:
        raise ModelError(model, f"it has {config.num_labels} labels; a reward model has one")


def check_architecture(loaded: PreTrainedModel, model: str, *, scalar: bool) -> None:
    """A model, with weights or without, must have the head that is worked with, and attention that takes packs.

    Raises:
        ModelError: naming what it lacks.
    """
    if scalar and not isinstance(getattr(loaded, "score", None), nn.Linear):
        raise ModelError(model, f"{type(loaded).__name__} has no linear head named score: it is no decoder classifier")
    head = None if scalar else loaded.get_output_embeddings()
    if not scalar and (head is None or getattr(head, "bias", None) is not None):
        raise ModelError(model, "its vocabulary head is missing or has a bias, which is not supported")
    if not loaded._supports_attention_backend:
        raise ModelError(model, f"{type(loaded).__name__} does not take packed sequences; choose another architecture")


def check_lora(model: str, lora: Lora, *, scalar: bool, trust_remote_code: bool = False) -> None:
    """The model must have the layers that `lora` names, and this machine what it needs.

    Raises:
        ModelError: naming what is missing.
    """
    empty = empty_model(model, scalar=scalar, dtype=torch.float32, trust_remote_code=trust_remote_code)
    lacks = missing_package(lora)
    if lacks is not None:
        raise ModelError(model, lacks)
    wrapped = ScalarModel(empty) if scalar else CausalModel(empty, vocab_chunk_tokens=1)
    _ready(wrapped, None, model, lora.model_copy(update={"base": "as_model"}))


def empty_model(model: str, *, scalar: bool, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The shapes of a model, without weights, on torch's meta device. `scalar` gives it one label.

    Raises:
        ModelError: as `load_config`.
    """
    config = load_config(model, trust_remote_code=trust_remote_code)
    if scalar:
        config.num_labels = 1
    auto: Any = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            empty: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # numbers that don't go together, an architecture without such a head
        raise ModelError(model, f"no model can be made of its config ({one_line(error)})") from error
    return empty


def is_classifier(config: Any) -> bool:
    """Whether a config is of a sequence classifier, as reward models are."""
    return any("SequenceClassification" in name for name in config.architectures or [])


def load_causal(
    model: str,
    *,
    dtype: torch.dtype,
    vocab_chunk_tokens: int,
    trust_remote_code: bool = False,
    lora: Lora | None = None,
    sharded: bool = False,
    token_ids: int | None = None,
) -> CausalModel:
    """A causal model that runs packed, without dropout; with `lora`, frozen and with new adapters.

    With `sharded`, parameters are left on the meta device for the engine to read, each rank its part.

    Args:
        token_ids: probabilities are over so many ids, from 0; over all rows of the vocabulary head by default.

    Raises:
        ModelError: when the folder can't be loaded as one, or has no such layers as `lora` names.
    """
    config = _without_dropout(load_config(model, trust_remote_code=trust_remote_code))
    loaded, stored = _load(AutoModelForCausalLM, model, config, dtype, trust_remote_code, lora, sharded)
    check_architecture(loaded, model, scalar=False)
    return _ready(CausalModel(loaded, vocab_chunk_tokens, token_ids), stored, model, lora)


def load_scalar(
    model: str,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    trust_remote_code: bool = False,
    lora: Lora | None = None,
    sharded: bool = False,
) -> ScalarModel:
    """A model with a scalar head that runs packed, without dropout; with `lora`, frozen but for head and new adapters.

    The folder of a causal model gets a new head from N(0, 1/(hidden + 1)), as in Stiennon et al. 2020. With `sharded`,
    parameters that the folder has are left on the meta device for the engine to read, each rank its part.

    Raises:
        ModelError: when the folder can't be loaded as one, or has no such layers as `lora` names.
    """
    config = _without_dropout(load_config(model, trust_remote_code=trust_remote_code))
    is_new = not is_classifier(config)
    check_one_label(model, config)
    config.num_labels = 1
    auto, drawn = AutoModelForSequenceClassification, {"score.weight"} if is_new else frozenset()
    loaded, stored = _load(auto, model, config, dtype, trust_remote_code, lora, sharded, drawn)
    check_architecture(loaded, model, scalar=True)
    if is_new:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(loaded.score.weight.shape).normal_(
            0, math.sqrt(1 / (config.hidden_size + 1)), generator=generator
        )
        with torch.no_grad():
            loaded.score.weight.copy_(weight)
    return _ready(ScalarModel(loaded), stored, model, lora)


Wrapped = TypeVar("Wrapped", bound=RoleModel)


def _ready(wrapped: Wrapped, stored: StoredWeights | None, model: str, lora: Lora | None) -> Wrapped:
    """The model with its adapters, and with what its weights are to be read from."""
    wrapped.stored = stored
    if lora is not None:
        try:
            with nullcontext() if stored is None else adapters_in_memory(wrapped):
                add_adapters(wrapped, lora, model)
        except ValueError as error:
            raise ModelError(model, f"can't get the adapters of lora: {error}") from error
    return wrapped


def _load(
    auto: Any,
    model: str,
    config: Any,
    dtype: torch.dtype,
    trust_remote_code: bool,
    lora: Lora | None,
    sharded: bool,
    drawn: Set[str] = frozenset(),
) -> tuple[PreTrainedModel, StoredWeights | None]:
    """The model with all its weights, or with `sharded` what they are read from.

    Args:
        drawn: parameters that the folder need not have.
    """
    stored = None
    try:
        # What is held in 4 bits is made of whole weights, so these are loaded.
        if sharded and quantization(lora, dtype) is None:
            loaded, stored = build_on_meta(
                auto, model, config, dtype, attention=PACKED_ATTENTION, trust_remote_code=trust_remote_code
            )
            lacks = [name for name, weight in loaded.named_parameters() if not weight.is_meta and name not in drawn]
        else:
            loaded, found = auto.from_pretrained(
                model,
                config=config,
                dtype=dtype,
                attn_implementation=PACKED_ATTENTION,
                quantization_config=quantization(lora, dtype),
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
            # transformers draws what the files lack, with a warning that nobody reads in an actor.
            lacks = sorted(name for name in found["missing_keys"] if name not in drawn)
            if not lacks:
                _check_finite(loaded, model)
        if lacks:
            raise ValueError(f"its files lack {', '.join(lacks[:3])}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(model, f"can't be loaded ({one_line(error)})") from error
    return loaded, stored


def _check_finite(loaded: PreTrainedModel, model: str) -> None:
    if getattr(loaded, "hf_quantizer", None) is not None:  # its codes of 4 bits are finite whatever they are made of
        check_finite_files(model)
        return
    for name, parameter in loaded.named_parameters():
        if not is_finite(parameter):
            stored = StoredWeights(model, loaded, headers_only=True, any_format=True)
            raise ValueError(not_finite(name, stored.files(name)))


def _without_dropout(config: Any) -> Any:
    """PPO's ratio is 1 at the first step only when both passes see the same network."""
    for name, value in config.to_dict().items():
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def _check_folder(model: str) -> None:
    path = Path(model)
    if path.exists():
        if not (path / "config.json").is_file():
            raise ModelError(model, "the folder has no config.json, so it is no Hugging Face model")
        try:
            read_config(path / "config.json", model)
        except ShapeError as error:  # transformers goes on with a list, or with nothing, as if it had no keys
            raise ModelError(model, error.reason) from error
    elif not may_be_on_hub(model):
        raise ModelError(model, "no such folder; `rlhf-ray prepare` makes the ones that the examples use")
    elif why := why_no_model(model):
        raise ModelError(model, why)


_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_MOST_LAYERS = 1000  # a mistyped number of layers would otherwise be built, one after the other


def _check_sizes(model: str, config: Any) -> None:
    for name in _SIZES:
        size = getattr(config, name, 1)  # not every architecture has each of them
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ModelError(model, f"{name} in its config.json is {size!r}, not a number of at least 1")
    if getattr(config, "num_hidden_layers", 1) > _MOST_LAYERS:
        raise ModelError(
            model, f"num_hidden_layers in its config.json is {config.num_hidden_layers}: no model has so many"
        )
    names = config.architectures
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ModelError(model, f"architectures in its config.json is {names!r}, not a list of names")


def one_line(error: BaseException) -> str:
    """What an error says, on one line and of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} …"


_LONGEST_REASON = 600
