"""`rlhf-ray submit`, `stop` and `logs`: runs as Ray jobs on a cluster."""

import logging
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_ray.cli.arguments import Config, Overrides, checked_path
from rlhf_ray.cli.failures import INTERRUPTED, how_stopped, say

if TYPE_CHECKING:
    from rlhf_ray.cluster.jobs import Jobs
    from rlhf_ray.cluster.package import Package
    from rlhf_ray.config.jobs import Job

logger = logging.getLogger("rlhf_ray")

Address = Annotated[
    str,
    typer.Option(
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
        metavar="URL",
        help="The cluster's dashboard, such as http://HEAD:8265; auto is the cluster on this machine.",
        show_default=False,
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id that submit printed.", show_default=False)]


def submit(
    config: Config,
    address: Address,
    overrides: Overrides = None,
    wait: Annotated[
        bool,
        typer.Option("--wait/--no-wait", help="Show what the job writes to its end, or print its id and leave."),
    ] = True,
    job_id: Annotated[
        str | None,
        typer.Option("--id", metavar="ID", help="Id of the job. By default the config's name and the time."),
    ] = None,
    working_dir: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            callback=checked_path,
            help="Folder to send, which relative paths are meant from.",
            file_okay=False,
        ),
    ] = Path("."),
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave these files out too, as in a .gitignore. Can be repeated."),
    ] = None,
    python: Annotated[
        str, typer.Option(metavar="PATH", help="Python on the cluster's head node that has rlhf_ray.")
    ] = "python",
) -> None:
    """Run `train` as a Ray job: check the config, send the working directory, show what the job writes.

    The exit code is the job's own. Ctrl-C leaves the job running.

    Not sent: what .gitignore and .rayignore name; runs/, models/ and data/ of the folder; checkpoints, *.safetensors,
    *.gguf, .git, virtual environments, caches. Relative paths of the config that lead there, and run.dir, are made
    absolute: they must be on storage that every node sees.

    \b
    Examples:
      rlhf-ray submit configs/tiny_sft.yaml --address http://head:8265
      rlhf-ray submit my.yaml run.steps=100 --no-wait --id my-run --address http://head:8265
      rlhf-ray logs my-run --follow --address http://head:8265
    """
    from rlhf_ray.cluster.jobs import Jobs, default_id, entrypoint
    from rlhf_ray.cluster.package import package, pinned_paths
    from rlhf_ray.config.loading import load_config

    job = load_config(config, overrides or ())
    content = package(working_dir, [*(exclude or ()), *_results_within(job, working_dir)])
    within = _within(config, content)
    name = default_id(job.name, datetime.now()) if job_id is None else _checked_id(job_id)
    pinned = pinned_paths(job, content)
    for path in pinned:
        logger.info("%s: %s is not sent; the job uses %s", path.setting, path.value, path.path)
    command = entrypoint(within, [*(overrides or ()), *(path.override for path in pinned)], python)
    jobs = Jobs(address)
    logger.info("sending %s", content)
    jobs.submit(content, name, command, {"name": job.name, "job": job.job, "config": str(within)})
    if not wait:
        typer.echo(name)
        say(f"{_how_to_follow(jobs, name)}; {_how_to_stop(jobs, name)}")
        return
    logger.info("submitted job %s: %s", name, command)
    _follow(jobs, name)


def stop(job: JobId, address: Address) -> None:
    """End a job in order, and wait until it has.

    The same command that started it goes on from its newest checkpoint.

    \b
    Example:
      rlhf-ray stop my-run --address http://head:8265
    """
    from rlhf_ray.cluster.jobs import Jobs

    status = str(Jobs(address).stop(job)).lower()
    say(f"job {job} is stopped" if status == "stopped" else f"job {job} had ended before: it {status}")


def logs(
    job: JobId,
    address: Address,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends, and exit with its exit code.")
    ] = False,
) -> None:
    """Show what a job has written.

    \b
    Examples:
      rlhf-ray logs my-run --address http://head:8265
      rlhf-ray logs my-run --follow --address http://head:8265
    """
    from rlhf_ray.cluster.jobs import Jobs

    jobs = Jobs(address)
    if follow:
        _follow(jobs, job)
    else:
        typer.echo(jobs.logs(job), nl=False)


def _follow(jobs: "Jobs", name: str) -> None:
    """Show a job's log on stdout until it ends, and exit with its code."""
    try:
        ended = jobs.follow(name, lambda chunk: typer.echo(chunk, nl=False))
    except KeyboardInterrupt as stopped:
        what, _ = how_stopped(stopped)
        say(f"{what}, but job {name} goes on. {_how_to_follow(jobs, name)}; {_how_to_stop(jobs, name)}")
        raise typer.Exit(INTERRUPTED) from None
    say(ended.message, error=ended.exit_code != 0)
    raise typer.Exit(ended.exit_code)


def _how_to_follow(jobs: "Jobs", name: str) -> str:
    return f"To follow it: rlhf-ray logs {name} --follow --address {jobs.address}"


def _how_to_stop(jobs: "Jobs", name: str) -> str:
    return f"to stop it: rlhf-ray stop {name} --address {jobs.address}"


def _within(config: Path, content: "Package") -> Path:
    """The config's path in the job."""
    from rlhf_ray.config.loading import ConfigError

    path = config.resolve()
    if not path.is_relative_to(content.folder):
        problem = f"is not in {content.folder}, the folder that is sent: name its folder with --working-dir"
        raise ConfigError(str(config), [problem])
    within = path.relative_to(content.folder)
    if within not in content.files:
        problem = "is not sent with its folder, since a .gitignore or one of the rules in --help leaves it out: move it"
        raise ConfigError(str(config), [problem])
    return within


def _results_within(job: "Job", working_dir: Path) -> list[str]:
    """The run folder is not to be sent, whatever it is called."""
    place, folder = (working_dir / job.run.dir).resolve(), working_dir.resolve()
    inside = place.is_relative_to(folder) and place != folder
    return [f"/{place.relative_to(folder)}"] if inside else []


def _checked_id(job_id: str) -> str:
    # It becomes part of addresses, in which `..` is another one, of the name of a log file, and an argument.
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", job_id):
        problem = f"{job_id!r} is not made of at most 100 letters, digits, . _ -, or begins with . or -"
        raise typer.BadParameter(problem, param_hint="--id")
    return job_id
