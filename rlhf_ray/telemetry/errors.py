"""What telemetry raises: every message names the file, metric or package, and the cure."""

from collections.abc import Mapping
from pathlib import Path


class TelemetryError(Exception):
    """Base of all errors raised by `rlhf_ray.telemetry`."""


class NonFiniteError(TelemetryError):
    """A number that JSON cannot hold: NaN or infinity.

    Attributes:
        step: at which it was to be written.
        values: the numbers by name.
    """

    def __init__(self, step: int, values: Mapping[str, float]) -> None:
        self.step = step
        self.values = dict(values)
        named = ", ".join(f"{name} is {value}" for name, value in self.values.items())
        super().__init__(f"step {step}: {named}; find what made it so, and leave out a metric that has no value")


class StepOrderError(TelemetryError):
    """A step written after a later one, or a second time, which a resumed run could not take back."""

    def __init__(self, path: Path, step: int, last: int) -> None:
        self.path = path
        self.step = step
        self.last = last
        super().__init__(f"{path}: step {step} was to be written after step {last}; write each step once, in order")


class DamagedFileError(TelemetryError):
    """A file of the run folder that this run did not write, or that was changed since."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        self.problem = problem
        super().__init__(f"{path}: {problem}; repair the file, or move it away to start a new one")


class MissingTrackerError(TelemetryError):
    """An experiment tracker that the config asks for, whose package is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package
        super().__init__(
            f"run.{package} is set, but the package {package} is not installed: "
            f"pip install 'rlhf_ray[{package}]', or leave run.{package} out"
        )
