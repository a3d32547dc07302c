"""`rlhf-ray plan`: what a job needs, before anything starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_ray.cli.arguments import Config, Overrides
from rlhf_ray.cli.failures import FAILED

if TYPE_CHECKING:
    from rlhf_ray.cluster.planner.hardware import Hardware
    from rlhf_ray.config.jobs import JobConfig


def plan(
    config: Config,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="live|FILE|NAME",
            help="Cluster to plan for: `live` is what Ray reports at cluster.address, FILE describes one in YAML, NAME "
            "is one that comes along, such as 8xh100 or 1xl4. By default the running cluster when cluster.address or "
            "RAY_ADDRESS is set, else this machine with cluster.cpus.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Have each node of FILE or NAME so many times.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes, for other programs.")] = False,
) -> None:
    """Say where the memory of a job goes, and whether it fits. Of models it reads config.json alone.

    For each device and node: what every role holds when that is most, what is left, and where roles share devices each
    stage of a step. When it does not fit, the nearest changes with which it does. The exit code is 0 when it fits, 1
    when it does not.

    \b
    Examples:
      rlhf-ray plan configs/quickstart.yaml
      rlhf-ray plan my.yaml --cluster 8xh100
      rlhf-ray plan my.yaml --cluster 8xh100 --nodes 4 policy.engine.zero_stage=3
      rlhf-ray plan my.yaml --cluster my-cluster.yaml --json
    """
    from rlhf_ray.cli.plan_report import print_plan, to_json
    from rlhf_ray.cluster.planner.changes import nearest_changes
    from rlhf_ray.cluster.planner.memory import plan_memory
    from rlhf_ray.cluster.planner.processes import ProcessMemory
    from rlhf_ray.config.loading import load_config

    job = load_config(config, overrides or ())
    with _hardware(job, cluster, nodes) as hardware:
        processes = ProcessMemory()
        found = plan_memory(job, hardware, processes)
    changes = [] if found.fits else nearest_changes(job, hardware, processes)
    if as_json:
        typer.echo(to_json(found, hardware, changes))
    else:
        print_plan(found, hardware, changes)
    if not found.fits:
        raise typer.Exit(FAILED)


@contextmanager
def _hardware(job: "JobConfig", cluster: str | None, nodes: int) -> Iterator["Hardware"]:
    import os

    from rlhf_ray.cluster.planner.hardware import load_hardware, this_machine

    address = job.cluster.address or os.environ.get("RAY_ADDRESS")
    if cluster not in (None, "live"):
        yield load_hardware(cluster, nodes)
    elif cluster is None and address is None:
        yield this_machine(job.cluster.cpus)
    else:
        from rlhf_ray.cluster.planner.live import live_hardware

        with live_hardware(address or "auto") as hardware:
            yield hardware
