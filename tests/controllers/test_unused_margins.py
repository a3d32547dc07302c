"""Rows with a margin that no loss reads are told of, since other systems use a margin wherever there is one."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.loading import parse_config
from rlhf_ray.controllers.job import check

READS_NONE = "data.train: 1 of 2 rows have a margin, which the loss leaves out: "


def told(
    caplog: pytest.LogCaptureFixture, model: Path, path: Path, job: dict[str, Any], margins: Sequence[float]
) -> list[str]:
    """What a check says of margins, with the same rows to train on and to evaluate on."""
    rows = [
        {"prompt": f"How is day {number}? ", "chosen": "Fine.", "rejected": "Bad.", "margin": margin}
        for number, margin in enumerate(margins)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = "reward" if job["job"] == "reward_model" else "policy"
    config = {
        "name": "x",
        trained: {"model": str(model)},
        "data": {"train": str(path), "eval": str(path), "rows_per_step": 2, "max_tokens": 64},
        "run": {"dir": str(path.parent / "run"), "epochs": 1},
    }
    with caplog.at_level(logging.INFO, "rlhf_ray"):
        check(parse_config(config | job))
    return [record.getMessage() for record in caplog.records if "margin" in record.getMessage()]


@pytest.mark.parametrize(
    ("job", "why"),
    [
        ({"job": "reward_model"}, "loss.margin is 0: set it to 1 for the loss of Llama 2"),
        (
            {"job": "reward_model", "loss": {"type": "all_pairs"}},
            "loss.type 'all_pairs' reads none; 'bradley_terry' does, by its margin",
        ),
        ({"job": "preference"}, "no loss of job: preference reads one"),
    ],
)
def test_margins_that_no_loss_reads_are_told_once(
    caplog: pytest.LogCaptureFixture, prepared: Path, tmp_path: Path, job: dict[str, Any], why: str
) -> None:
    assert told(caplog, prepared / "models/tiny", tmp_path / "rows.jsonl", job, [0.5, 0]) == [READS_NONE + why]


@pytest.mark.parametrize(
    ("job", "margins"),
    [
        ({"job": "reward_model", "loss": {"type": "bradley_terry", "margin": 1.0}}, [0.5, 0]),
        ({"job": "reward_model"}, [0, 0]),
    ],
)
def test_nothing_is_told_of_margins_that_count_or_are_not_there(
    caplog: pytest.LogCaptureFixture, prepared: Path, tmp_path: Path, job: dict[str, Any], margins: list[float]
) -> None:
    assert told(caplog, prepared / "models/tiny", tmp_path / "rows.jsonl", job, margins) == []
