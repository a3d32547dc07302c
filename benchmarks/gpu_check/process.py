"""The process that checks run in."""

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.check import Check, CheckFailed, Outcome, Setting


class CheckProcess:
    """Runs checks one after the other, in one process as long as they pass: it has the libraries loaded. What a check
    that failed left behind goes with its process, and the next one gets a new one.

    Args:
        log: file that gets what libraries print.
    """

    def __init__(self, setting: Setting, log: Path) -> None:
        self._setting, self._log = setting, log
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Any = None

    def run(self, check: Check) -> Outcome:
        """Run a check, for as long as it may take."""
        if check.alone:
            self.end()
        if self._process is None:
            self._pipe, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(theirs, self._setting, self._log))
            self._process.start()
            theirs.close()
        began = time.perf_counter()
        self._pipe.send(check.run)
        state, found = "FAIL", f"no result within {check.limit_s:g} s"
        if self._pipe.poll(check.limit_s):
            try:
                state, found = self._pipe.recv()
            except EOFError:
                self._process.join(10)
                found = f"its process ended (exit code {self._process.exitcode})"
        if state != "pass":
            self.end()
        return Outcome(check.name, state, found, time.perf_counter() - began)  # type: ignore[arg-type]

    def end(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._pipe.close()
            self._process.join(5)  # it ends by itself when nobody asks any more, if it still can
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe: Connection, setting: Setting, log: Path) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(_result(pipe.recv(), setting))


def _result(run: Callable[[Setting], str], setting: Setting) -> tuple[str, str]:
    print(f"\n===== {run}", flush=True)
    try:
        return "pass", run(setting)
    except CheckFailed as error:
        return "FAIL", str(error)
    except Exception as error:  # whatever a library raises is the result of this check
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        return "FAIL", f"{type(error).__name__}: {first}"[:300]
