"""A Hugging Face folder from a checkpoint, without a cluster."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from rlhf_ray.config.loading import load_config
from rlhf_ray.config.roles import ModelSource, RoleSpec
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
    # The one that the job is about comes first.
    roles = {spec.name: spec for spec in load_config(run_dir / "config.yaml").roles if spec.trained}
    role = next(iter(roles)) if role is None else role
    if role not in roles:
        raise ExportError(f"the run in {run_dir} trained no {role}, only {' and '.join(roles)}: see --role")
    if not (checkpoint / role).is_dir():
        raise CheckpointError(checkpoint, f"holds no {role}, although the run's config.yaml trains one")
    trained, source_model = roles[role], roles[role].model
    assert source_model is not None
    model, adapter = _rebuild(trained, source_model, checkpoint)
    scalar = trained.kind == "scalar"
    # What was trained to score, unlike a critic, has a scale that is known.
    scale = ScoreScale.of_metrics(checkpoint_metrics(checkpoint)) if scalar and trained.exported else None
    _write(model, adapter, scale, source_model, out)
    return Exported(out, checkpoint, role, scalar, None if adapter is None else out / ADAPTER_FOLDER)


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


def _rebuild(role: RoleSpec, source: ModelSource, checkpoint: Path) -> tuple[PreTrainedModel, Adapter | None]:
    assert role.model_engine is not None
    dtype: torch.dtype = getattr(torch, role.model_engine.dtype)
    model = _without_weights(role, source, dtype)
    try:
        weights = saved_weights(checkpoint / role.name, dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(checkpoint, f"its {role.name} can't be read: {error}") from error
    what = f"{role.name} from {source.path!r}"
    adapter = None
    if role.lora is not None:
        weights, adapter = _merge(weights, role, source, dtype, checkpoint, what)
    _fill(model, weights, checkpoint, what)
    return model, adapter


def _merge(
    saved: Mapping[str, torch.Tensor],
    role: RoleSpec,
    source: ModelSource,
    dtype: torch.dtype,
    checkpoint: Path,
    what: str,
) -> tuple[dict[str, torch.Tensor], Adapter]:
    """All weights of the base model with the saved adapters in them, and the adapter by itself."""
    trust = source.trust_remote_code
    model = (
        heads.load_scalar(source.path, dtype=dtype, trust_remote_code=trust, lora=role.lora)
        if role.kind == "scalar"
        else heads.load_causal(source.path, dtype=dtype, vocab_chunk_tokens=1, trust_remote_code=trust, lora=role.lora)
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


def _without_weights(role: RoleSpec, source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    scalar, trust = role.kind == "scalar", source.trust_remote_code
    try:
        model = heads.empty_model(source.path, scalar=scalar, dtype=dtype, trust_remote_code=trust)
    except ModelError as error:
        note = "config, tokenizer and code of an export come from there; a relative path counts from the current folder"
        raise ModelError(source.path, f"{error.reason} ({note})") from error
    read_generation_config(model, source.path)
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
    model: PreTrainedModel, adapter: Adapter | None, scale: ScoreScale | None, source: ModelSource, out: Path
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=out.parent) as scratch:
        whole = Path(scratch) / "model"
        save_model(model, whole)
        write_scale(whole, scale)
        tokenizer = heads.load_tokenizer(source.path, trust_remote_code=source.trust_remote_code)
        tokenizer.save_pretrained(whole)
        if adapter is not None:
            adapter.write(whole / ADAPTER_FOLDER)
        os.rename(whole, out)  # an empty folder is replaced
