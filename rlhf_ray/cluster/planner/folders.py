"""The config.json of a model folder, of a file, or of a name on the hub."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_ray.cluster.planner.errors import PlanError
from rlhf_ray.cluster.planner.public_models import PUBLIC_MODELS
from rlhf_ray.cluster.planner.shapes import ModelShape


@cache
def read_shape(model: str) -> ModelShape:
    """The shape of a model: a folder with a config.json, such a file itself, or a name on the hub; for a few public
    models the name alone does.

    Raises:
        PlanError: when there is no such file, it can't be read or fetched, or the architecture is not known.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise PlanError(f"model {model!r}", "the folder has no config.json, so it is no Hugging Face model")
    elif model in PUBLIC_MODELS:
        return ModelShape.of(PUBLIC_MODELS[model], model)
    elif not path.is_file():
        path = _from_hub(model)
    return ModelShape.of(_content(path, model), model)


def _content(path: Path, model: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"model {model!r}", f"its config.json can't be read ({error})") from error
    if not isinstance(content, dict):
        raise PlanError(f"model {model!r}", "its config.json is no JSON object")
    return content


def _from_hub(model: str) -> Path:
    looks_local = model.startswith((".", "/", "~")) or len(Path(model).parts) != 2
    if looks_local or Path(model).parts[0] in ("models", "runs"):
        raise PlanError(
            f"model {model!r}",
            "no such folder; `rlhf-ray prepare` makes the ones that the examples use. A folder that holds nothing but "
            "the model's config.json is enough to plan",
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:  # the hub's client raises a dozen kinds, and those of the libraries beneath it
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PlanError(
            f"model {model!r}",
            f"there is no such folder, and its config.json can't be had from the hub ({first}): check the name and the "
            "network, or name a folder that holds its config.json",
        ) from error
