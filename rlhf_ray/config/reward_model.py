"""The section of a reward model that learns."""

from rlhf_ray.config.base import Section
from rlhf_ray.config.paths import UsablePath
from rlhf_ray.config.training import (
    Lora,
    SupervisedOptimizer,
    TrainingEngine,
)


class RewardModel(Section):
    """The model that learns to score."""

    model: UsablePath
    """Folder of a causal language model, which gets a new scalar head, or of a reward model to train on."""
    trust_remote_code: bool = False
    """Run Python code that comes with this model. Off unless you have read that code."""
    engine: TrainingEngine = TrainingEngine()
    """How it is held and trained."""
    lora: Lora | None = None
    """Train low-rank adapters beside frozen weights; by default all weights are trained."""
    optimizer: SupervisedOptimizer = SupervisedOptimizer()
    """How it is updated."""
