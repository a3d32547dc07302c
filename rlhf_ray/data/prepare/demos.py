"""LLaMA-Factory's demonstration data: conversations with two answers of which one is better, and with one answer
that is good or bad."""

import json
import logging
import random
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ray.data.prepare.downloads import Distribution, download
from rlhf_ray.data.prepare.rows import SEED, LabelRow, Messages, PreferenceRow, require, write_rows

logger = logging.getLogger(__name__)

# The data is in the source archive only.
LLAMAFACTORY = Distribution(
    "llamafactory", "0.9.5", "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f", sdist=True
)

EVAL_ROWS = 40
MIN_TRAIN_ROWS = 250

_ROLES = {"human": "user", "gpt": "assistant"}

_Answered = TypeVar("_Answered", bound=PreferenceRow | LabelRow)


def build_dpo_demo(stage: Path, target: Path) -> None:
    """Pairs of answers."""
    source = _read("dpo_en_demo.json", stage / "work", "dpo-demo")
    rows = [
        PreferenceRow(
            f"dpo-{number}",
            *(
                _messages(turns, "from", "value")
                for turns in (row["conversations"], [row["chosen"]], [row["rejected"]])
            ),
        )
        for number, row in enumerate(source)
    ]
    _write_split(stage, "dpo", usable(rows))


def build_kto_demo(stage: Path, target: Path) -> None:
    """Single answers with labels."""
    source = _read("kto_en_demo.json", stage / "work", "kto-demo")
    rows = []
    for number, row in enumerate(source):
        messages = _messages(row["messages"], "role", "content")
        rows.append(LabelRow(f"kto-{number}", messages[:-1], messages[-1:], row["label"]))
    _write_split(stage, "kto", usable(rows))


def _read(name: str, work: Path, item: str) -> list[dict[str, Any]]:
    with tarfile.open(download(LLAMAFACTORY, work, item)) as sdist:
        file = sdist.extractfile(f"llamafactory-{LLAMAFACTORY.version}/data/{name}")
        if file is None:
            raise ValueError(f"data/{name} is not a file in {LLAMAFACTORY.requirement}")
        rows: list[dict[str, Any]] = json.load(file)
    return rows


def _messages(turns: Sequence[dict[str, str]], role: str, content: str) -> Messages:
    """Turns whose keys have other names."""
    return [{"role": _ROLES.get(turn[role], turn[role]), "content": turn[content]} for turn in turns]


def _write_split(stage: Path, name: str, rows: Sequence[_Answered]) -> None:
    train, held_out = split_by_prompt(rows, EVAL_ROWS)
    require(len(train), MIN_TRAIN_ROWS, "training rows")
    require(len(held_out), EVAL_ROWS, "held-out rows")
    write_rows(stage / f"data/{name}_demo_train.jsonl", train)
    write_rows(stage / f"data/{name}_demo_eval.jsonl", held_out)


def usable(rows: Sequence[_Answered]) -> list[_Answered]:
    """The rows without those that have an empty answer, two equal answers, or stood there before."""
    left_out = {"with an empty answer": 0, "with equal answers": 0, "that stand twice": 0}
    kept: dict[str, _Answered] = {}
    for row in rows:
        answers = _answers(row)
        key = json.dumps([row.prompt, *answers])
        if not all(answer.strip() for answer in answers):
            left_out["with an empty answer"] += 1
        elif len(set(answers)) < len(answers):
            left_out["with equal answers"] += 1
        elif key in kept:
            left_out["that stand twice"] += 1
        else:
            kept[key] = row
    counts = ", ".join(f"{count} {why}" for why, count in left_out.items())
    logger.info("%d of %d rows are used; left out: %s", len(kept), len(rows), counts)
    return list(kept.values())


def _answers(row: PreferenceRow | LabelRow) -> list[str]:
    answers = [row.chosen, row.rejected] if isinstance(row, PreferenceRow) else [row.completion]
    return [message["content"] for [message] in answers]


def split_by_prompt(rows: Sequence[_Answered], eval_rows: int) -> tuple[list[_Answered], list[_Answered]]:
    """Training rows and `eval_rows` held-out rows, shuffled; no prompt is in both.

    There are fewer held-out rows when those of one prompt would exceed them.
    """
    by_prompt: defaultdict[str, list[_Answered]] = defaultdict(list)
    for row in rows:
        by_prompt[json.dumps(row.prompt)].append(row)
    groups = list(by_prompt.values())
    random.Random(SEED).shuffle(groups)
    train: list[_Answered] = []
    held_out: list[_Answered] = []
    for group in groups:
        (held_out if len(held_out) + len(group) <= eval_rows else train).extend(group)
    return train, held_out
