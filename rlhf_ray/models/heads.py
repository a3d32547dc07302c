"""transformers models as the roles use them: packed in, numbers at chosen positions out."""

import math
from dataclasses import replace
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
from rlhf_ray.models.attention import PACKED_ATTENTION
from rlhf_ray.models.lora import add_adapters, missing_package, quantization
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.models.sequence_parallel import SequenceParallel, copies_of_keys
from rlhf_ray.models.token_logprobs import Beside, TokenLogProbs


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


class CausalModel(nn.Module):
    """A language model that gives log-probs of chosen tokens.

    Attributes:
        sequence_parallel: the ranks that share every pack, None for a rank on its own. They all get the same result.
    """

    sequence_parallel: SequenceParallel | None = None

    def __init__(self, model: PreTrainedModel, vocab_chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.token_logprobs = TokenLogProbs(model.get_output_embeddings(), vocab_chunk_tokens)

    def forward(
        self,
        packed: PackedSequences,
        positions: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        beside: Beside = "entropy",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of `targets` `[positions]` as predicted at `positions` of the pack, and what `TokenLogProbs`
        measures beside them."""
        together = self.sequence_parallel
        if together is None:
            hidden = _hidden_states(self.model, packed)
            logprobs, second = self.token_logprobs(hidden[positions], targets, temperature, beside)
            return logprobs, second
        hidden, own = _own_states(self.model, packed, positions, together)
        logprobs, second = self.token_logprobs(hidden, targets[own], temperature, beside)
        return together.join(logprobs, own), second if beside == "nothing" else together.join(second, own)


class ScalarModel(nn.Module):
    """A decoder with one number per token: the critic's value, or at the last token the reward model's score.

    Attributes:
        sequence_parallel: as in `CausalModel`.
    """

    sequence_parallel: SequenceParallel | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, packed: PackedSequences, positions: torch.Tensor) -> torch.Tensor:
        """Float32 `[positions]`."""
        together = self.sequence_parallel
        if together is None:
            return self._scores(_hidden_states(self.model, packed)[positions])
        hidden, own = _own_states(self.model, packed, positions, together)
        return together.join(self._scores(hidden), own)

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.model.score(hidden)[:, 0].float()
        return scores


def _own_states(
    model: PreTrainedModel, packed: PackedSequences, positions: torch.Tensor, together: SequenceParallel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states of those of the `positions` that this rank computes, `[own positions, hidden]`, and bool
    `[positions]`, which these are."""
    packed = together.padded(packed)
    mine = together.own_slice(packed)
    part = replace(packed, input_ids=packed.input_ids[:, mine], position_ids=packed.position_ids[:, mine])
    own = (positions >= mine.start) & (positions < mine.stop)
    return _hidden_states(model, part, together)[positions[own] - mine.start], own


def _hidden_states(
    model: PreTrainedModel, packed: PackedSequences, together: SequenceParallel | None = None
) -> torch.Tensor:
    """Final hidden states `[tokens, hidden]`; with ranks `together`, ids and positions in `packed` are of a slice."""
    # Only where there are some: not every architecture hands on what it does not know.
    more: dict[str, Any] = {} if packed.prefixes is None else {"shared_prefixes": packed.prefixes}
    if together is not None:
        more["sequence_parallel"] = together
    out = model.base_model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        use_cache=False,
        cu_seq_lens_q=packed.cu_seqlens,
        cu_seq_lens_k=packed.cu_seqlens,
        max_length_q=packed.max_length,
        max_length_k=packed.max_length,
        **more,
    )
    hidden: torch.Tensor = out.last_hidden_state[0]
    return hidden


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


def check_sequence_parallel(model: str, ranks: int, *, trust_remote_code: bool = False) -> None:
    """The heads of a model must be dealt evenly to the ranks that share its packs.

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
) -> CausalModel:
    """A causal model that runs packed, without dropout; with `lora`, frozen and with new adapters.

    Raises:
        ModelError: when the folder can't be loaded as one, or has no such layers as `lora` names.
    """
    config = _without_dropout(load_config(model, trust_remote_code=trust_remote_code))
    loaded = _load(AutoModelForCausalLM, model, config, dtype, trust_remote_code, lora)
    head = loaded.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ModelError(model, "its vocabulary head is missing or has a bias, which is not supported")
    return _with_adapters(CausalModel(loaded, vocab_chunk_tokens), model, lora)


def load_scalar(
    model: str, *, dtype: torch.dtype, seed: int = 0, trust_remote_code: bool = False, lora: Lora | None = None
) -> ScalarModel:
    """A model with a scalar head that runs packed, without dropout; with `lora`, frozen but for head and new adapters.

    The folder of a causal model gets a new head from N(0, 1/(hidden + 1)), as in Stiennon et al. 2020.

    Raises:
        ModelError: when the folder can't be loaded as one, or has no such layers as `lora` names.
    """
    config = _without_dropout(load_config(model, trust_remote_code=trust_remote_code))
    is_new = not _is_classifier(config)
    if not is_new and config.num_labels != 1:
        raise ModelError(model, f"it has {config.num_labels} labels; a reward model has one")
    config.num_labels = 1
    loaded = _load(AutoModelForSequenceClassification, model, config, dtype, trust_remote_code, lora)
    if not isinstance(getattr(loaded, "score", None), nn.Linear):
        raise ModelError(model, f"{type(loaded).__name__} has no linear head named score: it is no decoder classifier")
    if is_new:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(loaded.score.weight.shape).normal_(
            0, math.sqrt(1 / (config.hidden_size + 1)), generator=generator
        )
        with torch.no_grad():
            loaded.score.weight.copy_(weight)
    return _with_adapters(ScalarModel(loaded), model, lora)


RoleModel = TypeVar("RoleModel", CausalModel, ScalarModel)


def _with_adapters(wrapped: RoleModel, model: str, lora: Lora | None) -> RoleModel:
    if lora is not None:
        try:
            add_adapters(wrapped, lora, model)
        except ValueError as error:
            raise ModelError(model, f"can't get the adapters of lora: {error}") from error
    return wrapped


def _load(
    auto: Any, model: str, config: Any, dtype: torch.dtype, trust_remote_code: bool, lora: Lora | None
) -> PreTrainedModel:
    try:
        loaded: PreTrainedModel = auto.from_pretrained(
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
    return loaded


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
