"""`rlhf-ray status`: what a run does right now, or how it ended."""

import os
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_ray.cli.arguments import checked_path

if TYPE_CHECKING:
    from rlhf_ray.cli.run_snapshots import ClusterSight, FolderSight

_RUNS = Path("runs")


def status(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            callback=checked_path,
            help="Folder of a run, or its name. By default all runs of the cluster at --address or RAY_ADDRESS, and "
            "without those the run in runs/ that was started last.",
            show_default=False,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster: host:port of its head, ray://host:port from outside of it, or auto. By default the one "
            "that the run's folder names.",
            show_default=False,
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until the run ends.")] = False,
    every: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="Time between two looks.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each run and look.")] = False,
) -> None:
    """Show what a run does right now: step, phase, queue, tokens/s, and what each of its actors is at.

    Works from any process that reaches the cluster. Of a run that is over, or whose cluster is gone, it shows how far
    it came and why it ended, from the run's folder.

    \b
    Examples:
      rlhf-ray status
      rlhf-ray status runs/tiny --watch
      rlhf-ray status tiny --address 10.0.0.1:6379
      rlhf-ray status --address auto --json
    """
    from rlhf_ray.cli.status_screen import Screen

    with closing(_sight_of(run, address)) as record, Screen(live=watch, as_json=as_json) as screen:
        while True:
            found = record.look()
            screen.show(found)
            if not (watch and any(snapshot.state == "running" for snapshot in found)):
                return
            time.sleep(every)


def _sight_of(run: str | None, address: str | None) -> "FolderSight | ClusterSight":
    """A folder that is named counts; a name is one on the cluster, if there is one to ask."""
    from rlhf_ray.cli.run_snapshots import ClusterSight, FolderSight, newest_run

    if run is not None and Path(run).is_dir():
        if not (Path(run) / "manifest.json").exists():
            raise _bad(f"{run} has no manifest.json: it is no folder of a run, or of one that has not started yet")
        return FolderSight(Path(run), address)
    cluster = address or os.environ.get("RAY_ADDRESS")
    if cluster:
        return ClusterSight(cluster, run)
    folder = newest_run(_RUNS) if run is None else _RUNS / run
    if folder is None:
        raise _bad(f"there is no run in {_RUNS.absolute()}")
    if not (folder / "manifest.json").exists():
        raise _bad(f"there is no folder {run}, and none of a run in {folder}")
    return FolderSight(folder, None)


def _bad(problem: str) -> typer.BadParameter:
    cure = "give the folder of a run, or with --address the cluster that it is on"
    return typer.BadParameter(f"{problem}; {cure}", param_hint="RUN")
