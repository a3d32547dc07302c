"""`rlhf-ray preflight`: what `train` looks at before it loads a model."""

from typing import Annotated

import typer

from rlhf_ray.cli.arguments import Config, Overrides


def preflight(
    config: Config,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Cluster to look at, as cluster.address: auto is the one on this machine.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Look at every node of the cluster, in half a minute at most, without loading a model.

    Where GPUs of several nodes meet over NCCL it may take 73 s.

    Places for all roles; the same libraries; models readable; run.dir writable, shared and large enough; clocks, ports
    and collectives between the nodes that will talk. The exit code is 1 when something would fail.

    \b
    Examples:
      rlhf-ray preflight my.yaml --cluster auto
      rlhf-ray preflight my.yaml placement.rollout.engines=8 --cluster 10.0.0.1:6379
    """
    from rlhf_ray.cli.results import note, number_format_lines, show
    from rlhf_ray.cluster.preflight.report import PreflightError
    from rlhf_ray.cluster.preflight.run import preflight as look
    from rlhf_ray.cluster.session import ray_session
    from rlhf_ray.config.loading import load_config
    from rlhf_ray.controllers.number_formats import choose_on_cluster

    address = [] if cluster is None else [f"cluster.address={cluster}"]
    job = load_config(config, [*(overrides or ()), *address])
    with ray_session(job.cluster, job.name):
        formats = choose_on_cluster(job)
        report = look(formats.config)
    show(number_format_lines(formats))
    show((check.name, check.status, check.detail) for check in report.checks)
    note(str(report))
    if report.problems:
        raise PreflightError(report.problems)
