"""The other columns of a prompt's row travel with each of its samples, or the row is refused."""

import json
import math
import pickle
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.data import PromptData
from rlhf_ray.data.cursor import PromptCursor
from rlhf_ray.data.errors import DataError, DataErrors
from rlhf_ray.data.prompt_rows import PromptRows, RowColumn
from rlhf_ray.data.prompts import PromptSet, load_prompts
from rlhf_ray.data.requests import requests_for

ROWS: list[dict[str, Any]] = [
    {"prompt": "2 + 3 =", "answer": 5, "meta": {"group": ["a", None], "größe": 0.5}},
    {"prompt": "2 + 4 =", "answer": None, "uid": "u"},
    {"prompt": "2 + 5 ="},
]


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    def make(rows: list[Any], budget: int = 100, **config: Any) -> PromptSet:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        settings = PromptData(**{"prompts": str(path), "prompts_per_step": 1, **config})
        return load_prompts(settings, tokenizer, budget)

    return make


def test_a_row_keeps_its_other_columns_and_says_which_there_are(load: Any) -> None:
    found = load(ROWS)
    assert [json.loads(found.row(number)) for number in range(3)] == [
        {"answer": 5, "meta": {"group": ["a", None], "größe": 0.5}},
        {"answer": None},
        {},
    ]
    assert found.columns == (RowColumn("answer", 2, "rows:3"), RowColumn("meta", 1, "u"))


def test_rows_without_other_columns_carry_nothing(load: Any) -> None:
    found = load([{"prompt": "a"}, {"question": "b", "prompt": "c"}], columns={"prompt": "prompt"})
    assert found.columns == (RowColumn("question", 1, "rows:1"),)
    found = load([{"prompt": "a", "uid": 1}, {"prompt": "b", "uid": 2}])
    assert (found.rows, found.columns, found.row(1)) == ((), (), b"{}")
    found = load([{"question": "a", "id": 1}], columns={"prompt": "question", "uid": "id"})
    assert found.columns == ()


def test_columns_of_prompts_that_are_left_out_do_not_count(load: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    long = {"prompt": "A warm and funny film with a wonderful cast.", "answer": 1}
    found = load([long, {"prompt": "A"}, {"prompt": "B", "level": 2}], budget=3)
    assert found.columns == (RowColumn("level", 1, "rows:2"),)
    assert [found.row(number) for number in range(2)] == [b"{}", b'{"level":2}']


def test_columns_that_are_kept_can_be_named(load: Any) -> None:
    found = load(ROWS, keep_columns=["answer"])
    assert [column.name for column in found.columns] == ["answer"]
    assert json.loads(found.row(0)) == {"answer": 5}
    assert load(ROWS, keep_columns=[]).columns == ()
    with pytest.raises(DataError, match=r"data.keep_columns names 'level', but no prompt that is used has such"):
        load(ROWS, keep_columns=["answer", "level"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "a", "text": "x" * 65_536},
            r"has other columns of 65,547 bytes as JSON, more than the 65,536",
        ),
        ('{"prompt": "a", "answer": "\\ud800"}', "has half of a surrogate pair in one of its columns"),
        ('{"prompt": "a", "answer": 1e999}', "column 'answer' has the number inf, which JSON does not have: name in"),
    ],
)
def test_columns_that_cannot_travel_are_refused_unless_they_are_left(row: Any, reason: str, load: Any) -> None:
    with pytest.raises(DataErrors, match=f":2: {reason}"):
        load([{"prompt": "b"}, row])
    assert len(load([{"prompt": "b"}, row], keep_columns=[])) == 2


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"a", "has a value of type bytes"),
        (datetime(2026, 1, 1, tzinfo=UTC), "has a value of type datetime"),
        ([math.nan], "has the number nan"),
    ],
)
def test_values_that_json_lacks_are_refused(
    value: Any, reason: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "extra": value}]), path)
    with pytest.raises(DataErrors, match=f"column 'extra' {reason}, which JSON does not have"):
        load_prompts(PromptData(prompts=str(path), prompts_per_step=1), tokenizer, 100)


def test_too_many_columns_are_refused(load: Any) -> None:
    with pytest.raises(DataError, match="its rows have 1,001 different columns beside their prompts, more than 1,000"):
        load([{"prompt": "a", f"k{number}": 1} for number in range(1001)])


def test_each_request_has_the_row_of_its_prompt_and_samples_share_it(load: Any) -> None:
    prompts = load(ROWS)
    tickets = PromptCursor(3, seed=0, shuffle=True).take(6)
    requests = requests_for(prompts, tickets, samples_per_prompt=4, run_seed=1)
    assert [request.row for request in requests] == [prompts.row(ticket.index) for ticket in tickets for _ in range(4)]
    big = b'{"text":"' + b"x" * 60_000 + b'"}'
    once = PromptRows.of([big])
    many = PromptRows.of([big] * 64)
    assert len(pickle.dumps(many)) < len(pickle.dumps(once)) + 64 * 8 + 100


def test_columns_are_lists_with_none_where_a_row_has_none() -> None:
    rows = PromptRows.of([b'{"a":[1]}', b'{"a":[1]}', b"{}", b'{"b":"x","a":null}'])
    found = rows.columns(["a", "b", "c"])
    assert found == {"a": [[1], [1], None, None], "b": [None, None, None, "x"], "c": [None] * 4}
    assert found["a"][0] is not found["a"][1]
    assert rows.columns([]) == {}
