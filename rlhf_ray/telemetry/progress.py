"""How far a run is: a live line where there is a terminal, one log line per step elsewhere."""

import functools
import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as LiveProgress

from rlhf_ray.telemetry import status

logger = logging.getLogger("rlhf_ray")

# Label and format of the metrics that are shown, in order, as far as a step has them.
_SHOWN = (
    ("reward/mean", "reward {:.3f}"),
    ("kl/mean", "KL {:.2f}"),
    ("train/loss", "loss {:.3f}"),
    ("train/accuracy", "accuracy {:.2f}"),
    ("eval/accuracy", "eval accuracy {:.2f}"),
    ("eval/perplexity", "eval perplexity {:.2f}"),
    ("throughput/response_tokens_per_s", "{:,.0f} tokens/s"),
)


class QuietConsole(Console):
    """A console whose lines are as long as they are where no terminal limits them, and that falls silent when nobody
    reads it any more; rich's own ends the process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if "width" not in options and not self.is_terminal:
            self.width = 1000

    def on_broken_pipe(self) -> None:
        self.quiet = True


@functools.cache
def stderr_console() -> Console:
    """The one console of the process: log lines and the live line must share it not to overwrite each other."""
    return QuietConsole(stderr=True)


def setup_logging(level: int | str = logging.INFO) -> None:
    """Send the logger `rlhf_ray` to stderr: coloured on a terminal, plain lines elsewhere. A second call replaces."""
    console = stderr_console()
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, omit_repeated_times=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="[%X]"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(level)
    # Some libraries set up the root logger on import; every line would come twice.
    logger.propagate = False


class Progress:
    """Shows the steps of one run. A display that fails switches itself off and never stops the run.

    Args:
        name: of the run.
        steps: of the whole run.
        done: steps that an earlier run already did.
        clock: seconds, for the time that is left.
    """

    def __init__(self, name: str, steps: int, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._steps = steps
        self._done = done
        self._clock = clock
        self._last_s = clock()
        self._step_s: deque[float] = deque(maxlen=20)
        self._live: LiveProgress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        self._last_s = self._clock()
        self._safely(self._start)
        return self

    def __exit__(self, *_: object) -> None:
        self._safely(self._stop)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` is done, with what it measured."""
        self._safely(lambda: self._show(step, metrics))

    def _start(self) -> None:
        console = stderr_console()
        if not console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
        )
        self._live = LiveProgress(*columns, console=console, refresh_per_second=2)
        self._task = self._live.add_task(self._name, total=self._steps, completed=self._done, facts="starting")
        self._live.start()

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        now = self._clock()
        if step > self._done:
            self._step_s.append((now - self._last_s) / (step - self._done))
        self._done, self._last_s = step, now
        facts = [form.format(metrics[name]) for name, form in _SHOWN if name in metrics]
        if self._step_s:
            # The median: first steps and steps with a checkpoint take longer than the others.
            each = statistics.median(self._step_s)
            facts += [f"{each:.1f} s/step", f"{_clock_face(each * max(0, self._steps - step))} left"]
        if self._live is not None:
            self._live.update(self._task, completed=step, facts=" · ".join(facts))
        else:
            logger.info("%s", " · ".join([f"{self._name} step {step}/{self._steps}", *facts]))

    def _safely(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            live, self._live = self._live, None
            if live is not None:
                with suppress(Exception):
                    live.stop()
            logger.debug("progress display failed", exc_info=True)


class Silence(logging.Handler):
    """Says what a run is at when the log has said nothing for a while, as before the first step of a large model.

    It hears the log as one of its handlers.

    Args:
        run: its name.
        steps: of the whole run.
        run_dir: its folder.
        progress: how far it is, with the phase that goes on.
        clock: seconds since the epoch, as phases have them.
    """

    FIRST_S = 30.0
    AGAIN_S = 60.0
    _OWN = "breaks_silence"

    def __init__(
        self,
        run: str,
        steps: int,
        run_dir: Path,
        progress: Callable[[], status.Progress],
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(logging.INFO)
        self._run, self._steps, self._run_dir, self._progress, self._clock = run, steps, run_dir, progress, clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="silence", daemon=True)

    def __enter__(self) -> Self:
        self._heard_s, self._limit_s = self._clock(), self.FIRST_S
        logger.addHandler(self)
        if not stderr_console().is_terminal:  # there a live line moves
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)
        logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """The log says something."""
        self._heard_s = self._clock()
        self._limit_s = self.AGAIN_S if hasattr(record, self._OWN) else self.FIRST_S

    def look(self) -> None:
        """Break the silence if it has lasted long enough."""
        now = self._clock()
        if now - self._heard_s < self._limit_s:
            return
        at = self._progress()
        phase = {"start": "start of actors and models", "": "between phases"}.get(at.phase, at.phase)
        facts = [f"{self._run} step {min(at.step + 1, self._steps)}/{self._steps}"]
        facts.append(f"{phase} for {_clock_face(max(0.0, now - at.since_s))}")
        if at.phase == "generate" and at.shards is not None:
            facts.append(f"{at.shards.generated} of {sum(vars(at.shards).values())} shards")
        facts.append(f"`rlhf-ray status {self._run_dir}` says what each actor does")
        logger.info("%s", " · ".join(facts), extra={self._OWN: True})

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            try:
                self.look()
            except Exception:
                logger.debug("what the run is at could not be said", exc_info=True)


def _clock_face(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
