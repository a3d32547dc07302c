"""The run: its length, its folder, checkpoints, telemetry and time limits."""

from dataclasses import dataclass
from typing import Literal

from rlhf_ray.config.base import NonNegativeInt, PositiveInt, Seconds, Section
from rlhf_ray.config.paths import WritablePath


class KeepBest(Section):
    """Which checkpoint is kept beside the newest ones."""

    metric: str = "reward/mean"
    """Metric that ranks checkpoints."""
    mode: Literal["max", "min"] = "max"
    """Whether more or less is better."""


class Wandb(Section):
    """Weights & Biases, when the package `wandb` is installed."""

    project: str
    """Project that the run is logged to."""
    entity: str | None = None
    """Team or user; by default the account's own."""


class Mlflow(Section):
    """MLflow, when the package `mlflow` is installed."""

    experiment: str
    """Experiment that the run is logged to."""
    tracking_uri: str | None = None
    """Tracking server; by default MLflow's own setting."""


@dataclass(frozen=True)
class Limit:
    """How long something may take.

    Attributes:
        seconds: that it may take.
        setting: config key that says so, for errors.
    """

    seconds: float
    setting: str


class Timeouts(Section):
    """Seconds that each wait may take before the run stops with an error that says what it waited for."""

    setup_s: Seconds = 900.0
    """Start of the actors and loading of the models."""
    rollout_s: Seconds = 1800.0
    """Until the next shard of a step is generated."""
    score_s: Seconds = 900.0
    """Each wait for the scores of a step: rewards, log-probs, values, advantages."""
    update_s: Seconds = 1800.0
    """Update of policy and critic on one step."""
    sync_s: Seconds = 300.0
    """Transfer of new weights to the engines."""
    checkpoint_s: Seconds = 1800.0
    """Writing or reading of one checkpoint."""

    @property
    def setup(self) -> Limit:
        """As `setup_s`."""
        return Limit(self.setup_s, "run.timeouts.setup_s")

    @property
    def rollout(self) -> Limit:
        """As `rollout_s`."""
        return Limit(self.rollout_s, "run.timeouts.rollout_s")

    @property
    def score(self) -> Limit:
        """As `score_s`."""
        return Limit(self.score_s, "run.timeouts.score_s")

    @property
    def update(self) -> Limit:
        """As `update_s`."""
        return Limit(self.update_s, "run.timeouts.update_s")

    @property
    def sync(self) -> Limit:
        """As `sync_s`."""
        return Limit(self.sync_s, "run.timeouts.sync_s")

    @property
    def checkpoint(self) -> Limit:
        """As `checkpoint_s`."""
        return Limit(self.checkpoint_s, "run.timeouts.checkpoint_s")


class Run(Section):
    """What every job has."""

    dir: WritablePath
    """Folder of the run: config, metrics, samples, trace, checkpoints, export. Shared storage on a cluster."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints; 0 writes one at the end only."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_best: KeepBest | None = None
    """Keep the best checkpoint too."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest complete checkpoint of `dir`; `never` refuses a folder that has one."""
    export: bool = True
    """Write the trained model in Hugging Face format at each checkpoint, in the background, and at the end."""
    deterministic: bool = False
    """Same config, same numbers, bit for bit, resumed or not. docs/architecture.md says what it costs."""
    trace: bool = True
    """Write `timeline.json`, a Chrome trace of what each actor did when."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    wandb: Wandb | None = None
    """Log to Weights & Biases."""
    mlflow: Mlflow | None = None
    """Log to MLflow."""
    timeouts: Timeouts = Timeouts()
    """Limits of every wait."""


class PPORun(Run):
    """A PPO run."""

    steps: PositiveInt
    """PPO steps."""
    samples_every: PositiveInt = 1
    """Steps between those whose samples are written."""
    samples_kept: PositiveInt = 8
    """Samples written at such a step."""


class EpochRun(Run):
    """A run over a data set."""

    epochs: PositiveInt = 1
    """Passes over the training data."""
    eval_every: NonNegativeInt = 0
    """Optimizer steps between evaluations; 0 evaluates after the last step only."""
    patience: PositiveInt | None = None
    """End the run after so many evaluations in a row without a new best of `keep_best.metric`, and export the best
    checkpoint instead of the last. Each new best gets a checkpoint. None goes on to the last epoch."""


class SFTRun(EpochRun):
    """A run over a data set, or of a number of steps over a streamed one."""

    steps: PositiveInt | None = None
    """Optimizer steps of a run with `data.streaming`, which takes the place of `epochs`."""
