"""Progress is a live line on a terminal, log lines elsewhere, and never what stops a run."""

import io
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_ray.telemetry import progress, status
from rlhf_ray.telemetry.progress import Progress, QuietConsole, Silence, setup_logging

METRICS = {"reward/mean": 0.41234, "kl/mean": 3.2, "throughput/response_tokens_per_s": 1812.3, "policy/loss": 1.0}


@pytest.fixture(autouse=True)
def _logger_as_before() -> Iterator[None]:
    logger = logging.getLogger("rlhf_ray")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _on(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> io.StringIO:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    monkeypatch.setattr(progress, "stderr_console", lambda: console)
    return out


def test_without_a_terminal_each_step_is_one_log_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out, clock = _on(monkeypatch, terminal=False), _Clock()
    with caplog.at_level(logging.INFO), Progress("demo", steps=30, done=10, clock=clock) as shown:
        for step, seconds in ((11, 60.0), (12, 4.0), (13, 6.0)):
            clock.now += seconds
            shown.update(step, METRICS)
    assert len(caplog.messages) == 3
    assert caplog.messages[-1] == "demo step 13/30 · reward 0.412 · KL 3.20 · 1,812 tokens/s · 6.0 s/step · 1:42 left"
    assert caplog.records[-1].name == "rlhf_ray"
    assert out.getvalue() == ""


def test_on_a_terminal_the_line_shows_steps_and_metrics_and_nothing_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = _on(monkeypatch, terminal=True)
    with caplog.at_level(logging.INFO), Progress("demo [red]", steps=30) as shown:
        shown.update(7, METRICS)
    assert all(text in out.getvalue() for text in ("demo [red]", "7/30", "reward 0.412", "KL 3.20", "1,812 tokens/s"))
    assert caplog.messages == []


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError("the terminal hung up")])
def test_a_display_that_breaks_is_switched_off_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    class _Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    console = QuietConsole(file=_Gone(), force_terminal=True)
    monkeypatch.setattr(progress, "stderr_console", lambda: console)
    with Progress("demo", steps=2) as shown:
        shown.update(1, METRICS)
        shown.update(2, {"reward/mean": "not a number"})  # type: ignore[dict-item]


def test_an_error_of_the_run_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    _on(monkeypatch, terminal=True)
    with pytest.raises(KeyError, match="lost"), Progress("demo", steps=2):
        raise KeyError("lost")


def test_silence_is_broken_after_half_a_minute_and_again_each_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    _on(monkeypatch, terminal=True)  # no thread looks beside this one
    clock = _Clock()
    now = [status.Progress(0, "start", 0.0), status.Progress(1, "generate", 100.0, status.Shards(3, 1, 4))]
    logger = logging.getLogger("rlhf_ray")
    said: list[tuple[float, str]] = []
    with caplog.at_level(logging.INFO), Silence("demo", 2, Path("runs/x"), lambda: now[0], clock) as silence:
        for second in range(301):
            clock.now = float(second)
            if second == 130:
                logger.info("demo step 1/2")
                now.pop(0)
            caplog.clear()
            silence.look()
            said += [(clock.now, message) for message in caplog.messages]
    hint = " · `rlhf-ray status runs/x` says what each actor does"
    assert said == [
        (30.0, "demo step 1/2 · start of actors and models for 0:30" + hint),
        (90.0, "demo step 1/2 · start of actors and models for 1:30" + hint),
        (160.0, "demo step 2/2 · generate for 1:00 · 4 of 8 shards" + hint),
        (220.0, "demo step 2/2 · generate for 2:00 · 4 of 8 shards" + hint),
        (280.0, "demo step 2/2 · generate for 3:00 · 4 of 8 shards" + hint),
    ]
    assert silence not in logger.handlers


def test_plain_log_lines_name_level_and_logger_and_come_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _on(monkeypatch, terminal=False)
    setup_logging("INFO")
    setup_logging("INFO")
    logging.getLogger("rlhf_ray.telemetry").info("hello [bold]x[/bold]")
    logging.getLogger("rlhf_ray").debug("hidden")
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.endswith(" INFO rlhf_ray.telemetry: hello [bold]x[/bold]\n")


def test_on_a_terminal_log_lines_go_through_the_console_of_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    out = _on(monkeypatch, terminal=True)
    setup_logging()
    logging.getLogger("rlhf_ray").info("hello [bold]x[/bold]")
    assert "hello [bold]x[/bold]" in re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


def test_a_log_line_that_nobody_reads_does_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as gone:
        console = QuietConsole(file=gone, force_terminal=True)
        monkeypatch.setattr(progress, "stderr_console", lambda: console)
        setup_logging()
        logging.getLogger("rlhf_ray").info("hello")
        assert console.quiet
        with suppress(BrokenPipeError):
            gone.close()
