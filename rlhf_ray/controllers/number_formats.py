"""The number format of every role, chosen once before anything is loaded: what `dtype: auto` becomes."""

import logging
from collections.abc import Mapping
from pathlib import Path

from rlhf_ray.cluster.processors import look_at_cluster, look_here
from rlhf_ray.cluster.session import joined_address
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.number_formats import NumberFormats, choose, engines_of
from rlhf_ray.config.training import Dtype
from rlhf_ray.recovery.checkpoints import CheckpointStore

logger = logging.getLogger("rlhf_ray")


def choose_on_cluster(config: Job) -> NumberFormats:
    """For the cluster that this process is connected to; told in the log.

    Raises:
        ConfigError: the run goes on from a checkpoint, but its folder's config.yaml can't be read.
    """
    found = choose(config, look_at_cluster(config), kept=_kept(config), source=_source(config))
    for line in found.lines:
        logger.info("dtype auto: %s", line)
    for warning in found.warnings:
        logger.warning("%s", warning)
    return found


def choose_before_start(config: Job) -> NumberFormats:
    """What is known without a cluster: all of a job for this machine, of another what does not depend on its CPUs.

    Raises:
        ConfigError: as above.
    """
    look = look_here(config) if joined_address(config.cluster) is None else None
    return choose(config, look, kept=_kept(config), source=_source(config))


def _source(config: Job) -> str:
    return str(Path(config.run.dir) / "config.yaml")


def _kept(config: Job) -> Mapping[str, Dtype]:
    """What the run computes in that this one goes on with."""
    folder, path = Path(config.run.dir), Path(_source(config))
    store = CheckpointStore(folder, config.run.keep_last, config.run.keep_best)
    if config.run.resume == "never" or not path.is_file() or not store.steps():
        return {}
    return {key: one.dtype for key, one in engines_of(load_config(path)).items() if one.dtype_choice != "auto"}
