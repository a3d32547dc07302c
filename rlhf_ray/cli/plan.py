"""`rlhf-ray plan`: what a job needs, before anything starts."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_ray.cli.arguments import Config, Overrides, checked_path
from rlhf_ray.cli.failures import FAILED

if TYPE_CHECKING:
    from rlhf_ray.config.jobs import Job
    from rlhf_ray.config.number_formats import NumberFormats
    from rlhf_ray.planner.calibration import Calibration, Device
    from rlhf_ray.planner.hardware import Hardware


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
    search: Annotated[
        bool, typer.Option("--search", help="Say instead which placements are the fastest that fit there.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=checked_path,
            help="What `rlhf-ray calibrate` measured on such machines. By default what it measured on this one, where "
            "the plan is for it, else defaults.",
            show_default=False,
        ),
    ] = None,
    prompt_tokens: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="MEAN", help="Tokens of a prompt, for the times. By default the longest.", show_default=False
        ),
    ] = None,
    response_tokens: Annotated[
        float | None,
        typer.Option(
            min=1,
            metavar="MEAN",
            help="Tokens of a response, or of what is learnt of a row, for the times. By default the longest.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say where the memory of a job goes, whether it fits, and how long a step takes. Of models it reads config.json
    alone.

    For each device and node: what every role holds when that is most, what is left, and where roles share devices each
    stage of a step. When it does not fit, the nearest changes with which it does. Then the phases of a step, and which
    share of it each role idles. The exit code is 0 when it fits, 1 when it does not.

    \b
    Examples:
      rlhf-ray plan configs/quickstart.yaml
      rlhf-ray plan my.yaml --cluster 8xh100
      rlhf-ray plan my.yaml --cluster 8xh100 --nodes 4 policy.engine.zero_stage=3
      rlhf-ray plan my.yaml --cluster my-cluster.yaml --json
      rlhf-ray plan my.yaml --cluster 8xh100 --search --response-tokens 400
    """
    from rlhf_ray.cli.plan_report import print_plan, to_json
    from rlhf_ray.cli.results import number_format_lines, show
    from rlhf_ray.cli.time_report import print_proposals, print_time, proposals_json, time_json
    from rlhf_ray.config.loading import load_config
    from rlhf_ray.planner.changes import nearest_changes
    from rlhf_ray.planner.jobs import lengths_of
    from rlhf_ray.planner.memory import plan_memory
    from rlhf_ray.planner.search import best_placements
    from rlhf_ray.planner.step_time import predict

    job = load_config(config, overrides or ())
    lengths = lengths_of(job, prompt_tokens, response_tokens)
    with _hardware(job, cluster, nodes) as hardware:
        known = _constants(hardware, calibration, cluster)
        formats = _number_formats(job, hardware, known, calibration, cluster, search)
        job = formats.config
        processes = known[hardware.device].memory
        if search:
            proposals = best_placements(job, hardware, known, lengths)
            if as_json:
                typer.echo(json.dumps(proposals_json(proposals, lengths), indent=2))
            else:
                print_proposals(proposals, lengths, [known[hardware.device]])
                show(number_format_lines(formats))
            raise typer.Exit(0 if proposals else FAILED)
        found = plan_memory(job, hardware, processes)
        cached = found.engine.cached_tokens if found.engine and found.engine.starts else None
        step = predict(job, hardware, known, lengths, cached)
    changes = [] if found.fits else nearest_changes(job, hardware, processes)
    if as_json:
        typer.echo(to_json(found, hardware, changes, formats, time=time_json(step, lengths)))
    else:
        show(number_format_lines(formats))
        print_plan(found, hardware, changes)
        print_time(step, lengths, [known[hardware.device]])
    if not found.fits:
        raise typer.Exit(FAILED)


def _constants(hardware: "Hardware", path: Path | None, cluster: str | None) -> "Mapping[Device, Calibration]":
    from rlhf_ray.planner.calibration import constants, load_calibration
    from rlhf_ray.planner.hardware import PlanError
    from rlhf_ray.platform import machine_name

    if path is not None and (device := load_calibration(path).device) != hardware.device:
        has = "GPUs" if hardware.device == "gpu" else "no GPU"
        raise PlanError(f"--calibration {path}", f"it is of a {device.upper()}, but the cluster has {has}")
    here = machine_name() if path is None and cluster in (None, "live") else None
    return constants(path, here)


def _number_formats(
    job: "Job",
    hardware: "Hardware",
    known: "Mapping[Device, Calibration]",
    calibration: Path | None,
    cluster: str | None,
    search: bool,
) -> "NumberFormats":
    """For the machines that the plan is for: CPUs as they are where they can be looked at, else as the planner has
    them. A search puts all roles on GPUs where there are any."""
    from rlhf_ray.config.number_formats import choose
    from rlhf_ray.controllers.number_formats import choose_before_start, choose_on_cluster
    from rlhf_ray.planner.number_formats import planned_cpus

    if search and hardware.device == "gpu":
        return choose(job, None, all_on_gpus=True)
    if calibration is not None or cluster not in (None, "live"):
        return choose(job, planned_cpus(known["cpu"], calibration))
    if hardware.name == "this machine":
        return choose_before_start(job)
    return choose_on_cluster(job)


@contextmanager
def _hardware(job: "Job", cluster: str | None, nodes: int) -> Iterator["Hardware"]:
    import os

    from rlhf_ray.planner.hardware import load_hardware, this_machine

    address = job.cluster.address or os.environ.get("RAY_ADDRESS")
    if cluster not in (None, "live"):
        yield load_hardware(cluster, nodes)
    elif cluster is None and address is None:
        yield this_machine(job.cluster.cpus)
    else:
        from rlhf_ray.planner.hardware import live_hardware

        with live_hardware(address or "auto") as hardware:
            yield hardware
