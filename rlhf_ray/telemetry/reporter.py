"""The driver's side of the status: a thread that tells the run's status_actor how far the driver is.

The training loop only sets attributes here. Whatever happens to the status_actor, the loop neither waits nor fails.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from rlhf_ray.telemetry.status import About, Progress, Shards, phase_of
from rlhf_ray.telemetry.status_actor import create_status_actor
from rlhf_ray.telemetry.trace import SpanRecorder

logger = logging.getLogger(__name__)

# The driver is told to be silent after several of these.
HEARTBEAT_S = 5.0
_LOOK_EVERY_S = 0.5


class StatusReporter:
    """Tells the status_actor what changed, at most twice a second.

    Args:
        about: the run.
        recorder: of the driver's spans, which are its phases.
        shards: counts the shards of the step that goes on, None while there are none.
        export: gets what the status actor is told, for other watchers.
    """

    def __init__(
        self,
        about: About,
        recorder: SpanRecorder,
        step: int,
        *,
        shards: Callable[[], Shards | None],
        export: Callable[[Progress], None],
    ) -> None:
        self._about, self._recorder = about, recorder
        self._shards, self._export = shards, export
        self._done: tuple[int, dict[str, float]] = (step, {})
        self._board: Any = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def __enter__(self) -> Self:
        self._board = create_status_actor(self._about)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        self._stop.set()
        self._thread.join(timeout=10)
        ray.kill(self._board)

    def watch(self, role: str, actors: Sequence[Any]) -> None:
        """These are the ranks of a role."""
        self._board.watch.remote(role, list(actors))

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is complete."""
        self._done = (step, dict(metrics))

    def _run(self) -> None:
        try:
            self._tell_changes()
        except Exception:
            logger.warning("`rlhf-ray status` will not show how far this run is; the run goes on", exc_info=True)

    def _tell_changes(self) -> None:
        import ray

        told: Progress | None = None
        told_s, answer = 0.0, None
        while not self._stop.wait(_LOOK_EVERY_S):
            progress = self.progress()
            if progress == told and time.monotonic() - told_s < HEARTBEAT_S:
                continue
            self._export(progress)
            if answer is not None:
                ready, _ = ray.wait([answer], timeout=0)
                if not ready:
                    continue  # a slow status_actor gets the newest when it is done with the last
                ray.get(ready[0], timeout=60)  # raises when it is dead
            answer, told, told_s = self._board.tell.remote(progress), progress, time.monotonic()

    def progress(self) -> Progress:
        """How far the driver is, right now."""
        phase, since_s = phase_of(self._recorder.open(), self._recorder.idle_since_s)
        step, metrics = self._done
        return Progress(step, phase, since_s, self._shards(), metrics)
