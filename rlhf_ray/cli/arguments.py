"""What commands on a config share: its arguments, and whose problems they tell of."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


def checked_path(value: Path | str | None) -> Path | str | None:
    """For arguments that are paths: what no file can be called is refused before anything looks for it."""
    if value is not None:
        from rlhf_ray.config.paths import usable_path

        try:
            usable_path(str(value))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return value


def writable_file(path: Path) -> Path:
    """For what is written at the end of work that takes long: whether it can be is found out before.

    Raises:
        BadParameter: it can't.
    """
    from rlhf_ray.config.paths import why_not_writable

    why = "is a folder" if path.is_dir() else why_not_writable(path.parent.absolute())
    if why is not None:
        raise typer.BadParameter(f"{path} can't be written: {why}")
    return path


Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the job.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Set keys of the config, by dotted path: policy.optimizer.lr=1e-5, reward.0.weight=0.5 (entries of a list "
        "count from 0), data.eval=null. A value is read as YAML: quote what the shell would take apart.",
        show_default=False,
    ),
]


@contextmanager
def problems_of(config: Path) -> Iterator[None]:
    """What the check before the start finds is told of the file it was found in."""
    from rlhf_ray.config.loading import ConfigError

    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(config), error.problems) from None
