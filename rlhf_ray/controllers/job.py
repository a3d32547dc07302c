"""What a job type is beside its config: how its inputs are checked, what runs it, and what people are told of it.

A config names its definition by path (`Job.definition`), so that the config layer imports nothing of this.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import ConfigError
from rlhf_ray.config.number_formats import NumberFormats
from rlhf_ray.config.paths import why_not_writable
from rlhf_ray.config.plugs import import_named
from rlhf_ray.controllers.descriptions import Line, role_lines
from rlhf_ray.controllers.inputs import collect
from rlhf_ray.controllers.inspection import SourceReport
from rlhf_ray.telemetry.metrics import Metrics
from rlhf_ray.telemetry.trackers import check_trackers


class Inputs(Protocol):
    """What a check found; a job adds what its controller needs."""

    @property
    def steps(self) -> int:
        """Of the run."""


ConfigT = TypeVar("ConfigT", bound=Job)
InputsT = TypeVar("InputsT", bound=Inputs)


@dataclass(frozen=True)
class DataSource:
    """A source of rows that a config names.

    Attributes:
        key: dotted path of the setting.
        name: file, folder or hub name.
        limit: rows of it that are used; None for all.
        weight: among several.
    """

    key: str
    name: str
    limit: int | None = None
    weight: float = 1.0


class JobDefinition(ABC, Generic[ConfigT, InputsT]):
    """One job type."""

    @abstractmethod
    def check(self, config: ConfigT, problems: list[str]) -> InputsT | None:
        """Read models' configs, tokenizers and data, and add what can't work to `problems`, each with its dotted path;
        None where that leaves no inputs."""

    @abstractmethod
    def run(self, config: ConfigT, inputs: InputsT, formats: NumberFormats) -> None:
        """Start the actors on the Ray cluster that is there, train, and end them.

        Args:
            formats: what was chosen for `dtype: auto`; `config` has it in.
        """

    def finish(self, config: ConfigT) -> None:
        """Write what is made of a finished run's folder."""

    def describe(self, config: ConfigT, inputs: InputsT | None) -> Iterator[Line]:
        """The config in short. `inputs` are None where nobody asked for a check."""
        yield from role_lines(config)

    def results(self, config: ConfigT, rows: Sequence[Metrics]) -> Iterator[Line]:
        """How a finished run went, from its metrics."""
        yield from ()

    def sources(self, config: ConfigT) -> Sequence[DataSource]:
        """Where it reads rows from, in the order of its config."""
        return [DataSource(key, name) for key, name in config.data_files.items()]

    @property
    def mark(self) -> str:
        """What the marked tokens of an example are, or why there are none."""
        return ""

    def load_source(self, config: ConfigT, source: DataSource, report: SourceReport) -> None:
        """Read a source into a report on it. Raises `DataError`."""
        raise ConfigError("inspect", [f"{source.key}: job: {config.job} has nothing that would show what is in it"])


def definition_of(config: Job) -> JobDefinition[Any, Any]:
    """Of the job type of a config. Raises ConfigError for a job of somebody else's that names none."""
    path = type(config).definition
    try:
        found = import_named("job", path)
    except ValueError as error:
        raise ConfigError("preflight", [str(error)]) from None
    if not isinstance(found, JobDefinition):
        raise ConfigError("preflight", [f"job: {path!r} is of type {type(found).__name__}, not JobDefinition"])
    return found


def check(config: Job) -> Any:
    """Read models' configs, tokenizers and data, and look for what can't work; the inputs of the job's definition.

    Raises:
        ConfigError: with every problem found, each naming its dotted path; bad rows also by file and line.
    """
    problems: list[str] = []
    with collect(problems, "run"):
        check_trackers(config.run)
    for key, folder in config.folders.items():
        if why := why_not_writable(Path(folder)):
            problems.append(f"{key}: {why} (got {folder!r})")
    inputs = definition_of(config).check(config, problems)
    if problems or inputs is None:
        raise ConfigError("preflight", problems)
    return inputs
