"""The end of a run whose loss or gradient is no number."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.actors.trained import NonFiniteLossError
from rlhf_ray.recovery.files import replace_file


class TrainingDiverged(Exception):
    """A loss or gradient is NaN or infinite.

    Attributes:
        step: of the run.
        samples_file: where the samples that caused it are.
    """

    def __init__(self, step: int, samples_file: Path, cause: NonFiniteLossError) -> None:
        self.step, self.samples_file = step, samples_file
        super().__init__(f"step {step}: {cause} (they are in {samples_file})")


def write_failed_samples(run_dir: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the samples that a loss failed on, one JSON object a line, and return the file."""
    path = run_dir / f"failed_step_{step:06d}.jsonl"
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path
