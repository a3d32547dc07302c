"""From a config to a finished run, for every job type."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from rlhf_ray.cluster.daemons import LastWords
from rlhf_ray.cluster.preflight.report import PreflightError
from rlhf_ray.cluster.preflight.run import naming_lost_nodes, preflight
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config.jobs import Job
from rlhf_ray.controllers.epochs import ENDED
from rlhf_ray.controllers.job import check, definition_of
from rlhf_ray.controllers.number_formats import choose_on_cluster
from rlhf_ray.controllers.run_folder import outcome_of
from rlhf_ray.recovery.checkpoints import CheckpointStore
from rlhf_ray.recovery.files import replace_file
from rlhf_ray.telemetry.errors import DamagedFileError
from rlhf_ray.telemetry.manifest import end_session
from rlhf_ray.telemetry.plots import plot_curves

logger = logging.getLogger("rlhf_ray")


def train(config: Job, last_words: LastWords | None = None) -> Path:
    """Check, start the actors, run the job, and return its folder.

    Args:
        last_words: as `ray_session`; for a process that is the run's alone.

    Raises:
        ConfigError: before Ray starts.
        ClusterError, PreflightError, PlacementError: before a model is loaded.
        ActorDied, TaskFailed, RoleTimeout, RewardError, TrainingDiverged, NonFiniteLossError: while it runs.
    """
    folder = Path(config.run.dir)
    definition = definition_of(config)
    inputs = check(config)
    if _is_complete(config, inputs.steps):
        logger.info("%s holds this run, complete: choose another run.dir to train again", folder)
        return folder
    ending = None if last_words is None else partial(_end_without_cluster, folder, last_words)
    with ray_session(config.cluster, config.name, ending):
        formats = choose_on_cluster(config)
        with _preflight(formats.config):
            definition.run(formats.config, inputs, formats)
    definition.finish(config)
    plot_curves(folder)
    return folder


def _end_without_cluster(folder: Path, last_words: LastWords, error: BaseException) -> int:
    """What `RunFolder` does at the end of a run, for one whose controller hangs in Ray."""
    code = last_words(error)
    with suppress(DamagedFileError, OSError):  # it had not begun
        end_session(folder, *outcome_of(error))
    return code


@contextmanager
def _preflight(config: Job) -> Iterator[None]:
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


def _is_complete(config: Job, steps: int) -> bool:
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
