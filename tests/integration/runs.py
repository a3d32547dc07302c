"""What integration tests say about runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.telemetry.metrics import Metrics
from rlhf_ray.telemetry.names import find_metric

MakeConfig = Callable[..., PPOJob]


def without_clock(row: Metrics) -> Metrics:
    """The metrics that two equal runs share."""
    return {name: value for name, value in row.items() if not getattr(find_metric(name), "wall_clock", False)}


def exported_weights(folder: Path) -> dict[str, Any]:
    """Tensors of a Hugging Face folder by name."""
    return load_file(folder / "model.safetensors")
