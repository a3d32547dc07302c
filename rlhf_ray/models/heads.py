"""Model folders: what they hold, whether it can be used, and the models that roles make of it."""

import math
from collections.abc import Set
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
from rlhf_ray.data.hub import why_no_model
from rlhf_ray.models.attention import PACKED_ATTENTION
from rlhf_ray.models.lora import adapters_in_memory, add_adapters, missing_package, quantization
from rlhf_ray.models.on_meta import build_on_meta
from rlhf_ray.models.role_models import CausalModel, ScalarModel
from rlhf_ray.models.sequence_parallel import copies_of_keys
from rlhf_ray.models.stored_weights import StoredWeights


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
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(model, f"its tokenizer can't be loaded ({error})") from error
    return tokenizer


def check_tokenizer_matches(model: str, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False) -> None:
    """Every token id must have a row in the model's embedding.

    Raises:
        ModelError: naming both sizes.
    """
    config = load_config(model, trust_remote_code=trust_remote_code)
    largest = max(tokenizer.get_vocab().values())
    rows = config.get_text_config().vocab_size
    if largest >= rows:
        raise ModelError(
            model,
            f"its tokenizer has token ids up to {largest}, but its embedding has {rows} rows: the "
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
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(model, f"its config can't be loaded ({error})") from error
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
    if not _is_classifier(config):
        raise ModelError(
            model,
            f"it is a {', '.join(config.architectures or ['model of unknown type'])}, not a reward model: train one "
            "with job: reward_model",
        )
    if config.num_labels != 1:
        raise ModelError(model, f"it has {config.num_labels} labels; a reward model has one")


def check_lora(model: str, lora: Lora, *, scalar: bool, trust_remote_code: bool = False) -> None:
    """The model must have the layers that `lora` names, and this machine what it needs.

    Raises:
        ModelError: naming what is missing.
    """
    empty = empty_model(model, scalar=scalar, dtype=torch.float32, trust_remote_code=trust_remote_code)
    lacks = missing_package(lora)
    if lacks is not None:
        raise ModelError(model, lacks)
    unquantised = lora.model_copy(update={"base": "as_model"})
    if scalar:
        _with_adapters(ScalarModel(empty), model, unquantised)
    else:
        _with_adapters(CausalModel(empty, vocab_chunk_tokens=1), model, unquantised)


def empty_model(model: str, *, scalar: bool, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The shapes of a model, without weights, on torch's meta device. `scalar` gives it one label.

    Raises:
        ModelError: as `load_config`.
    """
    config = load_config(model, trust_remote_code=trust_remote_code)
    if scalar:
        config.num_labels = 1
    auto: Any = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    with torch.device("meta"):
        empty: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return empty


def _is_classifier(config: Any) -> bool:
    return any("SequenceClassification" in name for name in config.architectures or [])


def load_causal(
    model: str,
    *,
    dtype: torch.dtype,
    vocab_chunk_tokens: int,
    trust_remote_code: bool = False,
    lora: Lora | None = None,
    sharded: bool = False,
) -> CausalModel:
    """A causal model that runs packed, without dropout; with `lora`, frozen and with new adapters.

    With `sharded`, parameters are left on the meta device for the engine to read, each rank its part.

    Raises:
        ModelError: when the folder can't be loaded as one, or has no such layers as `lora` names.
    """
    config = _without_dropout(load_config(model, trust_remote_code=trust_remote_code))
    loaded, stored = _load(AutoModelForCausalLM, model, config, dtype, trust_remote_code, lora, sharded)
    head = loaded.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ModelError(model, "its vocabulary head is missing or has a bias, which is not supported")
    return _ready(CausalModel(loaded, vocab_chunk_tokens), stored, model, lora)


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
    is_new = not _is_classifier(config)
    if not is_new and config.num_labels != 1:
        raise ModelError(model, f"it has {config.num_labels} labels; a reward model has one")
    config.num_labels = 1
    auto, drawn = AutoModelForSequenceClassification, {"score.weight"} if is_new else frozenset()
    loaded, stored = _load(auto, model, config, dtype, trust_remote_code, lora, sharded, drawn)
    if not isinstance(getattr(loaded, "score", None), nn.Linear):
        raise ModelError(model, f"{type(loaded).__name__} has no linear head named score: it is no decoder classifier")
    if is_new:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(loaded.score.weight.shape).normal_(
            0, math.sqrt(1 / (config.hidden_size + 1)), generator=generator
        )
        with torch.no_grad():
            loaded.score.weight.copy_(weight)
    return _ready(ScalarModel(loaded), stored, model, lora)


Wrapped = TypeVar("Wrapped", CausalModel, ScalarModel)


def _ready(wrapped: Wrapped, stored: StoredWeights | None, model: str, lora: Lora | None) -> Wrapped:
    if stored is None:
        return _with_adapters(wrapped, model, lora)
    wrapped.stored = stored
    with adapters_in_memory(wrapped):
        return _with_adapters(wrapped, model, lora)


def _with_adapters(wrapped: Wrapped, model: str, lora: Lora | None) -> Wrapped:
    if lora is not None:
        try:
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
            if lacks:
                raise ValueError(f"its files lack {', '.join(lacks[:3])}")
        else:
            loaded = auto.from_pretrained(
                model,
                config=config,
                dtype=dtype,
                attn_implementation=PACKED_ATTENTION,
                quantization_config=quantization(lora, dtype),
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(model, f"can't be loaded ({error})") from error
    if not loaded._supports_attention_backend:
        raise ModelError(model, f"{type(loaded).__name__} does not take packed sequences; choose another architecture")
    return loaded, stored


def _without_dropout(config: Any) -> Any:
    """PPO's ratio is 1 at the first step only when both passes see the same network."""
    for name, value in config.to_dict().items():
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def _check_folder(model: str) -> None:
    path = Path(model)
    looks_local = (
        path.is_absolute() or model.startswith(".") or len(path.parts) != 2 or path.parts[0] in ("models", "runs")
    )
    if looks_local and not path.exists():
        raise ModelError(model, "no such folder; `rlhf-ray prepare` makes the ones that the examples use")
    if path.exists() and not (path / "config.json").is_file():
        raise ModelError(model, "the folder has no config.json, so it is no Hugging Face model")
    if not path.exists() and (why := why_no_model(model)):
        raise ModelError(model, why)
