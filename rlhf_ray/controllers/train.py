"""From a config to a finished run, for every job type."""

from pathlib import Path

from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config.jobs import JobConfig, PPOJob, RewardModelJob
from rlhf_ray.controllers.ppo import PPOController
from rlhf_ray.controllers.preflight import PairInputs, PPOInputs, check
from rlhf_ray.controllers.reward_model import RewardModelController, steps_of
from rlhf_ray.controllers.roles import ppo_roles, reward_model_role
from rlhf_ray.controllers.run_folder import Checkpointing, RunFolder
from rlhf_ray.telemetry.plots import plot_curves


def train(config: JobConfig) -> Path:
    """Check, start the actors, run the job, and return its folder.

    Raises:
        ConfigError: before Ray starts.
        ClusterError, PlacementError: before a model is loaded.
        RoleFailure, RoleTimeout, RewardError, TrainingDiverged, NonFiniteLossError: while it runs.
    """
    inputs = check(config)
    with ray_session(config.cluster, config.name):
        if isinstance(config, PPOJob) and isinstance(inputs, PPOInputs):
            _train_ppo(config, inputs)
        elif isinstance(config, RewardModelJob) and isinstance(inputs, PairInputs):
            _train_reward_model(config, inputs)
    folder = Path(config.run.dir)
    plot_curves(folder)
    return folder


def _train_ppo(config: PPOJob, inputs: PPOInputs) -> None:
    with RunFolder(config, config.run.steps) as folder, ppo_roles(config, inputs) as roles:
        trained = {"policy": roles.policy, "critic": roles.critic}
        checkpointing = Checkpointing(folder, trained, config.run.timeouts.checkpoint_s)
        PPOController(config, inputs, roles, folder, checkpointing).train()


def _train_reward_model(config: RewardModelJob, inputs: PairInputs) -> None:
    steps = steps_of(config, inputs)
    with RunFolder(config, steps) as folder, reward_model_role(config, steps) as group:
        checkpointing = Checkpointing(folder, {"reward": group}, config.run.timeouts.checkpoint_s)
        RewardModelController(config, inputs, group, folder, checkpointing).train()
