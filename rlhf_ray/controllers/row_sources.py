"""Which rows a step learns from: of a data set in the object store, or of a stream."""

import logging
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from rlhf_ray.config.jobs import EpochJob
from rlhf_ray.controllers.inputs import EpochInputs, RowSet
from rlhf_ray.controllers.run_folder import RunFolder
from rlhf_ray.data.cursor import PromptCursor
from rlhf_ray.data.packing import plan_micro_batches
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.data.streaming import ConversationStream
from rlhf_ray.telemetry.metrics import Metrics

logger = logging.getLogger("rlhf_ray")


class Split:
    """A data set in the object store.

    Attributes:
        name: `train` or `eval`.
        rows: the data set.
        ref: to it, in a list so that a call passes the reference and not the data.
    """

    def __init__(self, name: str, rows: RowSet) -> None:
        self.name, self.rows = name, rows
        self.ref = [ray.put(rows)]


def plan_rows(
    split: Split, rows: NDArray[np.int64], dp_size: int, max_tokens: int
) -> list[tuple[list[ray.ObjectRef], list[list[int]]]]:
    """Some rows in micro-batches for each data-parallel rank, as `RowPlan` has them."""
    plan = plan_micro_batches(split.rows.lengths[rows], dp_size, max_tokens)
    return [(split.ref, [rows[micro].tolist() for micro in mine]) for mine in plan]


class LoadedRows:
    """Epochs over a data set in memory, each in an order of its own."""

    def __init__(self, config: EpochJob, inputs: EpochInputs, rows: RowSet) -> None:
        self.split = Split("train", rows)
        self._epochs, self._steps, self._per_step = config.run.epochs, inputs.steps, config.rows_per_step
        self._cursor = PromptCursor(len(rows), derive_seed(config.seed, "rows"), shuffle=True)

    def take(self, step: int) -> tuple[Split, NDArray[np.int64], Metrics]:
        """A data set, the numbers of the rows of it that the next step learns from, and what to log of them.

        Epochs do not run into each other, so the last step of one takes what is left.
        """
        before = (step - 1) % (self._steps // self._epochs) * self._per_step
        count = min(self._per_step, len(self.split.rows) - before)
        rows = np.array([ticket.index for ticket in self._cursor.take(count)])
        return self.split, rows, {"epoch": step * self._epochs / self._steps}

    def state_dict(self) -> dict[str, Any]:
        """Where the cursor stands."""
        return dict(self._cursor.state_dict())

    def load_state_dict(self, state: Any) -> None:
        """Go on from there."""
        self._cursor.load_state_dict(state)


class StreamedRows:
    """Rows that are read for each step. Those that are skipped are logged and written to `dropped_rows.jsonl`, each
    when it is met first."""

    def __init__(self, config: EpochJob, stream: ConversationStream, folder: RunFolder) -> None:
        self._stream = stream
        self._per_step = config.rows_per_step
        self._dropped = folder.open_rows("dropped_rows.jsonl")

    def take(self, step: int) -> tuple[Split, NDArray[np.int64], Metrics]:
        """The same, of the next rows of the stream."""
        rows, dropped = self._stream.take(self._per_step)
        new = [row for row in dropped if not row.again]
        for row in new:
            logger.warning("skipped %s:%d: %s", row.source, row.row, row.reason)
        if new:
            facts = [{"source": row.source, "row": row.row, "reason": row.reason} for row in new]
            self._dropped.append(step, facts)
        return Split("train", rows), np.arange(len(rows)), {"data/dropped": float(len(dropped))}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Go on from there."""
        self._stream.load_state_dict(state)
