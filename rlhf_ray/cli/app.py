"""The commands. What is heavy is imported when a command runs, so that `--help` answers at once."""

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_ray.cli.arguments import Config, Overrides, checked_path, problems_of
from rlhf_ray.cli.calibrate import calibrate
from rlhf_ray.cli.data import data
from rlhf_ray.cli.failures import (
    Commands,
    exit_code,
    forget_failure,
    how_stopped,
    message_of,
    record_failure,
    say,
)
from rlhf_ray.cli.jobs import logs, stop, submit
from rlhf_ray.cli.plan import plan
from rlhf_ray.cli.preflight import preflight
from rlhf_ray.cli.status import status

if TYPE_CHECKING:
    from rlhf_ray.config.jobs import Job

logger = logging.getLogger("rlhf_ray")

main = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 success, 1 the run failed, 2 bad config or arguments, 129 hung up, 130 interrupted, "
    "143 terminated.",
)

main.add_typer(data, name="data")


def _show_version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        try:
            number = metadata.version("rlhf_ray")
        except metadata.PackageNotFoundError:
            number = "(not installed: run from its sources)"
        typer.echo(f"rlhf-ray {number}")
        raise typer.Exit


@main.callback()
def rlhf_ray(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log more, and show where an error came from.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    """Align language models on a Ray cluster: PPO and reward models with DeepSpeed and vLLM.

    \b
    Examples:
      rlhf-ray prepare --only tiny
      rlhf-ray validate configs/tiny_reward.yaml
      rlhf-ray train configs/tiny_reward.yaml
      rlhf-ray train configs/tiny.yaml run.steps=8 policy.optimizer.lr=5e-4
      rlhf-ray export runs/tiny my-model
    """
    from rlhf_ray.cli.quiet import quiet_libraries
    from rlhf_ray.telemetry.progress import setup_logging

    setup_logging(logging.DEBUG if verbose else logging.INFO)
    quiet_libraries(verbose)
    _import_from_here()


@main.command(short_help="Make models and data of the examples.")
def prepare(
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ITEM",
            help="Make this item and what it needs: tiny (without a network), smollm2-135m, imdb-prompts, "
            "imdb-reviews, movie-pairs, movie-choices, dpo-demo or kto-demo. Can be repeated. All of them by default.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        Path, typer.Option("--dir", metavar="PATH", callback=checked_path, help="Folder that gets models/ and data/.")
    ] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Make again what is there.")] = False,
) -> None:
    """Make the models and data that the examples use. What is there is reused.

    \b
    Examples:
      rlhf-ray prepare
      rlhf-ray prepare --only tiny
      rlhf-ray prepare --only imdb-prompts --only movie-pairs --dir /shared/rlhf
    """
    from rlhf_ray.cli.results import show
    from rlhf_ray.config.paths import why_not_writable
    from rlhf_ray.data.prepare import ITEMS, PrepareError
    from rlhf_ray.data.prepare import prepare as make

    if why := why_not_writable(target.absolute()):
        raise typer.BadParameter(f"{target} can't be written to: {why}", param_hint="--dir")
    try:
        items = make(target, only=set(only) if only else None, force=force)
    except PrepareError as error:
        if error.item not in ITEMS:
            raise typer.BadParameter(f"{error.problem} as {error.item!r}. {error.cure}", param_hint="--only") from None
        raise
    show(
        (item.name, f"made in {item.seconds:.0f} s" if item.built else "reused", str(path))
        for item in items
        for path in item.paths
    )


@main.command(short_help="Check a config, without starting.")
def validate(
    config: Config,
    overrides: Overrides = None,
    schema_only: Annotated[
        bool,
        typer.Option(
            "--schema-only", help="Check the file alone: open no model, data or reward service. Takes a second."
        ),
    ] = False,
) -> None:
    """Check a config, its models, data and reward functions, without starting anything.

    \b
    Examples:
      rlhf-ray validate configs/tiny.yaml
      rlhf-ray validate configs/tiny.yaml rollout.sampling.max_new_tokens=32 run.dir=runs/longer
      rlhf-ray validate my.yaml 'rollout.sampling.stop=["\\n\\n"]' --schema-only
    """
    from rlhf_ray.cli.results import config_lines, note, number_format_lines, show
    from rlhf_ray.config.loading import load_config
    from rlhf_ray.config.number_formats import choose

    job = load_config(config, overrides or ())
    inputs = None
    formats = choose(job, None)
    if not schema_only:
        from rlhf_ray.controllers.job import check
        from rlhf_ray.controllers.number_formats import choose_before_start

        with problems_of(config):
            inputs = check(job)
        formats = choose_before_start(job)
    show([*config_lines(formats.config, inputs), *number_format_lines(formats)])
    note(
        "valid"
        if inputs is not None
        else "valid, as far as the schema goes: models, data and rewards were not looked at"
    )


@main.command(short_help="Run a job, or go on with it.")
def train(config: Config, overrides: Overrides = None) -> None:
    """Run a job, or go on with it from its newest checkpoint, and say where the results are.

    The run folder (run.dir) gets metrics, curves, samples, checkpoints and the trained model in Hugging Face format.

    \b
    Examples:
      rlhf-ray train configs/tiny_reward.yaml
      rlhf-ray train configs/tiny.yaml run.dir=runs/second seed=8
      rlhf-ray train my.yaml cluster.address=auto placement.policy.ranks=4
    """
    from rlhf_ray.cli.results import run_lines, show
    from rlhf_ray.config.loading import ConfigError, load_config

    job = load_config(config, overrides or ())
    logger.info("checking %s", config)
    try:
        # Within the try, since the imports take seconds in which Ctrl-C may come.
        from rlhf_ray.controllers.train import train as run

        with problems_of(config):
            folder = run(job, partial(_last_words, job))
    except KeyboardInterrupt as stop:
        raise typer.Exit(_last_words(job, stop)) from None
    except ConfigError:
        raise
    except Exception as error:
        record_failure(Path(job.run.dir), error)
        raise
    forget_failure(folder)
    show(run_lines(job, folder))


@main.command(short_help="Make a model folder of a checkpoint.")
def export(
    checkpoint_or_run: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT_OR_RUN",
            callback=checked_path,
            help="Folder of a run, for its newest complete checkpoint, or of one checkpoint of it.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", callback=checked_path, help="Folder to write, new or empty.", show_default=False),
    ],
    role: Annotated[
        str | None,
        typer.Option(
            metavar="ROLE",
            help="Whose model: a role that the run trained. By default the policy, or the reward model of a "
            "reward-model run.",
        ),
    ] = None,
) -> None:
    """Make a Hugging Face folder of a checkpoint, of a finished or a stopped run. Needs no cluster.

    Works for every ZeRO stage and number of ranks. A ZeRO stage 3 checkpoint is unpickled: export only your own.
    Adapters are merged, and also written by themselves, into OUT/adapter.

    \b
    Examples:
      rlhf-ray export runs/tiny my-model
      rlhf-ray export runs/tiny/checkpoints/step_000002 my-model-early
      rlhf-ray export runs/tiny my-critic --role critic
    """
    from rlhf_ray.cli.results import show
    from rlhf_ray.recovery.convert import export_checkpoint

    done = export_checkpoint(checkpoint_or_run, out, role)
    auto = "AutoModelForSequenceClassification" if done.scalar else "AutoModelForCausalLM"
    adapter = [] if done.adapter is None else [("adapter", f"{done.adapter}, in peft's format")]
    show(
        [
            ("checkpoint", str(done.checkpoint)),
            (done.role, str(done.folder)),
            ("load", f"{auto}.from_pretrained({str(done.folder)!r})"),
            *adapter,
        ]
    )


def _import_from_here() -> None:
    """Find modules of one's own in the current folder, as Ray's workers do; an installed script has its own instead."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def _last_words(job: "Job", error: BaseException) -> int:
    """Say why a run ends before its end and how to go on; the exit code. Needs no cluster."""
    if isinstance(error, KeyboardInterrupt):
        what, code = how_stopped(error)
        say(f"{what}; {_how_to_resume(job)}")
        return code
    say(f"{message_of(error)}; {_how_to_resume(job)}", error=True)
    return exit_code(error)


def _how_to_resume(job: "Job") -> str:
    from rlhf_ray.cli.results import checkpointed_steps

    steps: Sequence[int] = checkpointed_steps(job)
    if not steps:
        return "there is no checkpoint yet, so the same command starts again from the beginning"
    if job.run.resume == "never":
        return f"to go on from step {steps[-1]}, give the same command with run.resume=auto"
    return f"the same command resumes it from the checkpoint of step {steps[-1]}"


main.command(short_help="Say what a job needs, and whether it fits.")(plan)
main.command(short_help="Measure this machine, for plan.")(calibrate)
main.command(short_help="Check a cluster, without starting.")(preflight)
main.command(short_help="Run a job on a cluster.")(submit)
main.command(short_help="End a submitted job.")(stop)
main.command(short_help="Show what a submitted job writes.")(logs)
main.command(short_help="Show what a run does right now.")(status)

if __name__ == "__main__":
    main()
