"""A Hugging Face folder from a checkpoint, without a cluster."""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedModel

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.roles import RoleSpec
from rlhf_ray.config.training import Dtype, Lora, TrainingEngine
from rlhf_ray.engines.saved_weights import saved_weights
from rlhf_ray.models import heads
from rlhf_ray.models.folder_checks import read_generation_config
from rlhf_ray.models.heads import ModelError
from rlhf_ray.models.lora import ADAPTER_FOLDER, Adapter
from rlhf_ray.models.saving import save_model
from rlhf_ray.models.score_scale import ScoreScale, write_scale
from rlhf_ray.models.weights import model_weights
from rlhf_ray.recovery.checkpoints import CheckpointStore, checkpoint_metrics
from rlhf_ray.recovery.seal import CheckpointError, verify

_DTYPES: dict[Dtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class ExportError(Exception):
    """An export that can't be made of what was asked for: the source, the output folder or the role."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: in Hugging Face format.
        checkpoint: that it was made from.
        role: whose model it is.
        scalar: it is an `AutoModelForSequenceClassification` with one label, not an `AutoModelForCausalLM`.
        adapter: in peft's format, within `folder`; None when all weights were trained.
    """

    folder: Path
    checkpoint: Path
    role: str
    scalar: bool
    adapter: Path | None


@dataclass(frozen=True)
class _TrainedModel:
    """A role's entry in the config: where its model came from, how it was held, and whether it was trained to score,
    so that the scale of its scores is known."""

    source: str
    dtype: Dtype
    scalar: bool
    trust_remote_code: bool
    lora: Lora | None
    scored: bool

    @classmethod
    def of(cls, role: RoleSpec) -> Self:
        assert role.model is not None
        assert isinstance(role.engine, TrainingEngine)
        scalar = role.kind == "scalar"
        return cls(
            role.model.path,
            role.engine.dtype,
            scalar,
            role.model.trust_remote_code,
            role.lora,
            scored=scalar and role.exported,
        )


def export_checkpoint(source: Path, out: Path, role: str | None = None) -> Exported:
    """Write the model of a checkpoint to `out`, adapters merged and beside it: complete, or not at all.

    Model source and number format are those in the run's config.yaml. A relative model path there is looked up from
    the current folder, as `train` did.

    Args:
        source: the folder of a run, which stands for its newest complete checkpoint, or of one checkpoint.
        out: a folder that is empty or does not exist.
        role: `policy`, `critic` or `reward`; by default what the job is about.

    Raises:
        ExportError: `source`, `out` or `role` can't be used.
        CheckpointError: the checkpoint is incomplete or damaged, or is not of the model that the config names.
        ConfigError: the run's config.yaml is missing or not of this version.
        ModelError: the folder that the model came from has gone.
    """
    out = out.resolve()
    _check_free(out)
    run_dir, checkpoint = _find(source.resolve())
    trained = _trained_models(load_config(run_dir / "config.yaml"))
    role = next(iter(trained)) if role is None else role
    if role not in trained:
        raise ExportError(f"the run in {run_dir} trained no {role}, only {' and '.join(trained)}: see --role")
    if not (checkpoint / role).is_dir():
        raise CheckpointError(checkpoint, f"holds no {role}, although the run's config.yaml trains one")
    model, adapter = _rebuild(trained[role], checkpoint, role)
    scale = ScoreScale.of_metrics(checkpoint_metrics(checkpoint)) if trained[role].scored else None
    _write(model, adapter, scale, trained[role], out)
    written = None if adapter is None else out / ADAPTER_FOLDER
    return Exported(out, checkpoint, role, trained[role].scalar, written)


def _check_free(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        what = "is not empty" if out.is_dir() else "is a file"
        raise ExportError(f"{out} {what}: choose another output folder, or remove it")


def _find(source: Path) -> tuple[Path, Path]:
    """The folders of the run and of the checkpoint that `source` stands for."""
    if not source.is_dir():
        raise ExportError(f"{source} is no folder")
    if name := re.fullmatch(r"step_(\d{6,})", source.name):
        verify(source, int(name[1]))
        return source.parent.parent, source
    if not (source / "checkpoints").is_dir():
        raise ExportError(
            f"{source} is neither the folder of a run with checkpoints nor one checkpoint, such as "
            "runs/NAME/checkpoints/step_000010"
        )
    newest = CheckpointStore(source, keep_last=1, keep_best=None).latest()
    if newest is None:
        raise ExportError(f"{source / 'checkpoints'} has no complete checkpoint yet")
    return source, newest.folder


def _trained_models(config: Job) -> dict[str, _TrainedModel]:
    """By role; the one that the job is about comes first."""
    return {role.name: _TrainedModel.of(role) for role in config.roles if role.trained}


def _rebuild(trained: _TrainedModel, checkpoint: Path, role: str) -> tuple[PreTrainedModel, Adapter | None]:
    dtype = _DTYPES[trained.dtype]
    model = _without_weights(trained, dtype)
    try:
        weights = saved_weights(checkpoint / role, dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(checkpoint, f"its {role} can't be read: {error}") from error
    what = f"{role} from {trained.source!r}"
    adapter = None
    if trained.lora is not None:
        weights, adapter = _merge(weights, trained, trained.lora, checkpoint, what)
    _fill(model, weights, checkpoint, what)
    return model, adapter


def _merge(
    saved: Mapping[str, torch.Tensor], trained: _TrainedModel, lora: Lora, checkpoint: Path, what: str
) -> tuple[dict[str, torch.Tensor], Adapter]:
    """All weights of the base model with the saved adapters in them, and the adapter by itself."""
    dtype, trust = _DTYPES[trained.dtype], trained.trust_remote_code
    model = (
        heads.load_scalar(trained.source, dtype=dtype, trust_remote_code=trust, lora=lora)
        if trained.scalar
        else heads.load_causal(trained.source, dtype=dtype, vocab_chunk_tokens=1, trust_remote_code=trust, lora=lora)
    )
    try:
        model.load_state_dict({f"model.{name}": tensor for name, tensor in saved.items()})
    except RuntimeError as error:
        raise CheckpointError(checkpoint, f"does not fit the {what} with its lora: {error}") from None
    adapter = Adapter.of(model, model.state_dict())
    merged = {}
    for weight in model_weights(model):
        merged[weight.name] = weight.parameter.data = weight.value()  # the base goes as the merged model comes
    return merged, adapter


def _without_weights(trained: _TrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model = heads.empty_model(
            trained.source, scalar=trained.scalar, dtype=dtype, trust_remote_code=trained.trust_remote_code
        )
    except ModelError as error:
        note = "config, tokenizer and code of an export come from there; a relative path counts from the current folder"
        raise ModelError(trained.source, f"{error.reason} ({note})") from error
    read_generation_config(model, trained.source)
    return model


def _fill(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], checkpoint: Path, what: str) -> None:
    """Give the model its weights, all of them and no others."""
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:  # other shapes
        raise CheckpointError(checkpoint, f"does not fit the {what}: {error}") from None
    model.tie_weights()
    filled = model.state_dict()
    missing = [name for name in missing if filled[name].is_meta]  # without the tied ones
    if missing or unexpected:
        lacks = [f"lacks {', '.join(missing[:3])}"] if missing else []
        has = [f"has {', '.join(unexpected[:3])}, which the model has not"] if unexpected else []
        raise CheckpointError(checkpoint, f"does not fit the {what}: it {' and '.join(lacks + has)}")


def _write(
    model: PreTrainedModel, adapter: Adapter | None, scale: ScoreScale | None, trained: _TrainedModel, out: Path
) -> None:
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_model(model, partial)
        write_scale(partial, scale)
        tokenizer = heads.load_tokenizer(trained.source, trust_remote_code=trained.trust_remote_code)
        tokenizer.save_pretrained(partial)
        if adapter is not None:
            adapter.write(partial / ADAPTER_FOLDER)
        os.rename(partial, out)  # an empty folder is replaced
    finally:
        shutil.rmtree(partial, ignore_errors=True)
