"""The checkpoints of a run: which exist, which one to go on from, and which are kept."""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from rlhf_ray.config.run import KeepBest
from rlhf_ray.recovery.seal import CheckpointError, is_sealed, remove, seal, verify

logger = logging.getLogger("rlhf_ray")

CONTROLLER = "controller.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        step: after which it was taken.
        folder: with what each role wrote.
        state: of the controller.
        metrics: of the step; `run.keep_best` ranks by one of them.
    """

    step: int
    folder: Path
    state: dict[str, Any]
    metrics: dict[str, float]


class _Controller(BaseModel):
    """Content of `controller.json`."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    state: dict[str, Any]
    metrics: dict[str, float]


class CheckpointStore:
    """Folders `run_dir/checkpoints/step_000010`, each complete or absent. Only one process may write; any may read."""

    def __init__(self, run_dir: Path, keep_last: int, keep_best: KeepBest | None) -> None:
        self._root = run_dir / "checkpoints"
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._damaged: set[int] = set()

    def begin(self, step: int) -> Path:
        """An empty folder for the roles to write to; an unfinished or damaged attempt at the step is removed.

        Raises:
            CheckpointError: an intact checkpoint of this or a later step exists. It would be lost, or, later, be
                resumed from although the run took another course.
        """
        for later in self.steps():
            if later >= step and self._load(later) is not None:
                raise CheckpointError(
                    self._folder(later),
                    f"is complete, so step {step} can't be written now; resume from it, or choose another run.dir",
                )
        folder = self._folder(step)
        if folder.exists():
            remove(folder)
        folder.mkdir(parents=True)
        return folder

    def commit(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, float]) -> Checkpoint:
        """Make the folder of `begin` a checkpoint, once all roles have written; then remove those no longer kept.

        Raises:
            CheckpointError: the folder doesn't exist, was committed before or holds something other than files and
                folders, or `state` or `metrics` would not come back equal from JSON.
        """
        folder = self._folder(step)
        if not folder.is_dir():
            raise CheckpointError(folder, f"does not exist; call begin({step}) before commit")
        if is_sealed(folder):
            raise CheckpointError(folder, "was committed before; a step is committed once")
        content = {"state": dict(state), "metrics": dict(metrics)}
        try:
            text = json.dumps(content, allow_nan=False)
            controller = _Controller.model_validate(json.loads(text))
        except (TypeError, ValueError) as error:
            raise CheckpointError(folder, f"state or metrics can't be written as JSON: {error}") from None
        if json.loads(text) != content:
            reason = "state would come back changed from JSON; use lists, not tuples, and strings as keys"
            raise CheckpointError(folder, reason)
        (folder / CONTROLLER).write_text(text, encoding="ascii")
        seal(folder, step)
        self._damaged.discard(step)
        self._prune(step)
        return Checkpoint(step, folder, controller.state, controller.metrics)

    def steps(self) -> list[int]:
        """Committed steps, ascending; damage is not looked for."""
        return [step for step in self._all_steps() if is_sealed(self._folder(step))]

    def latest(self) -> Checkpoint | None:
        """The newest complete and undamaged checkpoint; every newer folder is named in a warning, with the reason."""
        return self._first_intact(reversed(self._all_steps()))

    def best(self) -> Checkpoint | None:
        """The best undamaged checkpoint by `keep_best`; None if that is not set or none has the metric."""
        return self._first_intact(self._ranked(self.steps()))

    def _first_intact(self, steps: Iterable[int]) -> Checkpoint | None:
        return next((found for step in steps if (found := self._load(step)) is not None), None)

    def _load(self, step: int) -> Checkpoint | None:
        folder = self._folder(step)
        try:
            verify(folder, step)
            controller = _read_controller(folder)
        except CheckpointError as error:
            self._damaged.add(step)
            logger.warning("skipped a checkpoint that can't be used: %s", error)
            return None
        return Checkpoint(step, folder, controller.state, controller.metrics)

    def _ranked(self, steps: Iterable[int]) -> list[int]:
        """Those that have the metric, best first; of equals the newest."""
        if self._keep_best is None:
            return []
        values: dict[int, float] = {}
        for step in steps:
            try:
                values[step] = _read_controller(self._folder(step)).metrics[self._keep_best.metric]
            except (CheckpointError, KeyError):
                continue
        sign = 1 if self._keep_best.mode == "max" else -1
        return sorted(values, key=lambda step: (sign * values[step], step), reverse=True)

    def _prune(self, written: int) -> None:
        committed = self.steps()
        # One known to be damaged must not take the place of a good one.
        sound = [step for step in committed if step not in self._damaged]
        kept = {*sound[-self._keep_last :], *self._ranked(sound)[:1]}
        for step in self._all_steps():
            if step in kept or (step > written and step not in committed):
                continue
            try:
                remove(self._folder(step))
            except OSError as error:  # the new checkpoint stands, and the next commit tries again
                logger.warning("could not remove the old checkpoint %s: %s", self._folder(step), error)

    def _folder(self, step: int) -> Path:
        return self._root / f"step_{step:06d}"

    def _all_steps(self) -> list[int]:
        """Steps that have a folder, committed or not, ascending."""
        if not self._root.is_dir():
            return []
        names = (re.fullmatch(r"step_(\d{6}|[1-9]\d{6,})", path.name) for path in self._root.iterdir() if path.is_dir())
        return sorted(int(name[1]) for name in names if name)


def checkpoint_metrics(folder: Path) -> dict[str, float]:
    """The metrics of the step that a checkpoint was taken after.

    Raises:
        CheckpointError: they can't be read.
    """
    return _read_controller(folder).metrics


def _read_controller(folder: Path) -> _Controller:
    try:
        # Not by pydantic's own parser, which refuses the lone surrogates that sampled text may have.
        return _Controller.model_validate(json.loads((folder / CONTROLLER).read_bytes()))
    except (OSError, ValueError) as error:
        raise CheckpointError(folder, f"{CONTROLLER} unreadable: {error}") from None
