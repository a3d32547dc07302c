"""From a config to a finished run, for every job type."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_ray.cluster.preflight.report import PreflightError
from rlhf_ray.cluster.preflight.run import naming_lost_nodes, preflight
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config.jobs import JobConfig, PPOJob, PreferenceJob, RewardModelJob, SFTJob
from rlhf_ray.config.number_formats import NumberFormats
from rlhf_ray.controllers.epochs import ENDED, EpochController
from rlhf_ray.controllers.inputs import EpochInputs, PPOInputs, PreferenceInputs, check
from rlhf_ray.controllers.number_formats import choose_on_cluster
from rlhf_ray.controllers.ppo import PPOController
from rlhf_ray.controllers.ppo_roles import ppo_roles
from rlhf_ray.controllers.preference import PreferenceController
from rlhf_ray.controllers.reference_columns import reference_cache
from rlhf_ray.controllers.reward_model import RewardModelController
from rlhf_ray.controllers.roles import epoch_role, preference_roles
from rlhf_ray.controllers.run_folder import Checkpointing, RunFolder
from rlhf_ray.recovery.checkpoints import CheckpointStore
from rlhf_ray.telemetry.plots import plot_curves
from rlhf_ray.telemetry.reliability_plot import plot_reliability
from rlhf_ray.telemetry.rows import replace_file

logger = logging.getLogger("rlhf_ray")


def train(config: JobConfig) -> Path:
    """Check, start the actors, run the job, and return its folder.

    Raises:
        ConfigError: before Ray starts.
        ClusterError, PreflightError, PlacementError: before a model is loaded.
        RoleFailure, RoleTimeout, RewardError, TrainingDiverged, NonFiniteLossError: while it runs.
    """
    folder = Path(config.run.dir)
    inputs = check(config)
    if _is_complete(config, inputs.steps):
        logger.info("%s holds this run, complete: choose another run.dir to train again", folder)
        return folder
    with ray_session(config.cluster, config.name):
        formats = choose_on_cluster(config)
        config = formats.config
        with _preflight(config):
            if isinstance(config, PPOJob) and isinstance(inputs, PPOInputs):
                _train_ppo(config, inputs, formats)
            elif isinstance(config, PreferenceJob) and isinstance(inputs, PreferenceInputs):
                _train_preference(config, inputs, formats)
            elif isinstance(config, RewardModelJob | SFTJob) and isinstance(inputs, EpochInputs):
                _train_epochs(config, inputs, formats)
    if isinstance(config, RewardModelJob):
        plot_reliability(folder)
    plot_curves(folder)
    return folder


@contextmanager
def _preflight(config: JobConfig) -> Iterator[None]:
    """Have all nodes looked at, write down what was found, and name nodes that are lost later."""
    if not config.cluster.preflight:
        yield
        return
    report = preflight(config)
    if report.problems:
        raise PreflightError(report.problems)
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "preflight.json", (json.dumps(report.content(), indent=2) + "\n").encode())
    logger.info("preflight: %s", report)
    with naming_lost_nodes(report):
        yield


class ResumeError(Exception):
    """The run folder holds a run that this one must not touch."""


def _is_complete(config: JobConfig, steps: int) -> bool:
    """Whether the folder holds the last step and all that is written after it, so that there is nothing to do.

    Raises:
        ResumeError: the folder holds a run, and `run.resume` is `never`.
    """
    folder = Path(config.run.dir)
    last = CheckpointStore(folder, config.run.keep_last, config.run.keep_best).latest()
    if last is not None and config.run.resume == "never":
        raise ResumeError(
            f"run.resume is 'never', but {folder} holds a checkpoint of step {last.step}: choose another run.dir, "
            "remove the folder, or set run.resume to 'auto'"
        )
    written = (folder / "curves.png").exists() and (not config.run.export or (folder / "export").exists())
    return last is not None and (last.step >= steps or last.state.get(ENDED, False)) and written


def _train_ppo(config: PPOJob, inputs: PPOInputs, formats: NumberFormats) -> None:
    with RunFolder(config, inputs.steps, formats) as folder, ppo_roles(config, inputs, folder.watch) as roles:
        trained = {"policy": roles.policy, "critic": roles.critic}
        checkpointing = Checkpointing(folder, trained, config.run.timeouts.checkpoint_s, roles.devices)
        PPOController(config, inputs, roles, folder, checkpointing).train()


def _train_preference(config: PreferenceJob, inputs: PreferenceInputs, formats: NumberFormats) -> None:
    cache = reference_cache(config)
    complete = cache is not None and all(map(cache.has, inputs.sets))
    with_reference = config.algorithm.needs_reference and not config.policy_is_reference and not complete
    with (
        RunFolder(config, inputs.steps, formats) as folder,
        preference_roles(config, inputs.steps, folder.watch, with_reference=with_reference) as roles,
    ):
        trained = {"policy": roles.policy}
        if roles.reference is not None and config.reference.update_every:
            trained["reference"] = roles.reference
        checkpointing = Checkpointing(folder, trained, config.run.timeouts.checkpoint_s, roles.devices)
        PreferenceController(config, inputs, roles, cache, folder, checkpointing).train()


def _train_epochs(config: RewardModelJob | SFTJob, inputs: EpochInputs, formats: NumberFormats) -> None:
    with RunFolder(config, inputs.steps, formats) as folder, epoch_role(config, inputs.steps, folder.watch) as group:
        checkpointing = Checkpointing(folder, {config.role.name: group}, config.run.timeouts.checkpoint_s)
        controller = RewardModelController if isinstance(config, RewardModelJob) else EpochController
        controller(config, inputs, group, folder, checkpointing).train()
