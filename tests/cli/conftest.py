"""What the tests of the command line share: no test leaves its logging or its environment behind."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

from rlhf_ray.cli.app import main
from rlhf_ray.cli.quiet import quiet_libraries

RunCli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[RunCli]:
    """`rlhf-ray` with these arguments, of a user whose cache is empty; gives exit code, stdout and stderr."""
    logger = logging.getLogger("rlhf_ray")
    before = logger.handlers, logger.level, logger.propagate
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    transformers_logging.disable_progress_bar()  # it was imported before, and so without that variable
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])
    logger.handlers, logger.level, logger.propagate = before
    quiet_libraries(verbose=True)
