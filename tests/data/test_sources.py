"""The same rows come from every kind of source, and what is wrong with one is told of its file and number."""

import csv
import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_ray.config.data import ConversationData
from rlhf_ray.data.conversations import load_conversations
from rlhf_ray.data.errors import DataError, Findings, RowProblem
from rlhf_ray.data.sources import parse_rows, read_rows, stem_of, unit_of
from rlhf_ray.data.tokens import Tokenizer

ROWS: list[dict[str, Any]] = [
    {"uid": "a", "prompt": "Is it good?", "margin": 0.5},
    {"uid": "b", "prompt": 'A "film",\nof two lines', "margin": None},
    {"uid": "c", "prompt": "naïve 🙂", "margin": 2.0},
]
READ = [{key: value for key, value in row.items() if value is not None} for row in ROWS]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_json(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(rows, indent=1))
    return str(path)


def write_json_object(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps({"version": 1, "rows": rows}))
    return str(path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def write_folder(path: Path, rows: list[dict[str, Any]]) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(path)


def write_splits(path: Path, rows: list[dict[str, Any]]) -> str:
    found = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": found.select([0]), "test": found}).save_to_disk(path)
    return f"{path}:test"


Write = Callable[[Path, list[dict[str, Any]]], str]
WRITERS: list[tuple[str, Write]] = [
    ("rows.jsonl", write_jsonl),
    ("rows.json", write_json),
    ("rows.json", write_json_object),
    ("rows.csv", write_csv),
    ("rows.parquet", write_parquet),
    ("rows", write_folder),
    ("rows", write_splits),
]
every_kind = pytest.mark.parametrize(("name", "write"), WRITERS, ids=[write.__name__[6:] for _, write in WRITERS])


def read(source: str, columns: dict[str, str] | None = None, skip: int = 0) -> list[tuple[int, Any]]:
    return list(read_rows(source, "data.train", columns or {}, skip))


def reasons(source: str, columns: dict[str, str] | None = None) -> dict[int, str]:
    return {number: str(row) for number, row in read(source, columns) if isinstance(row, RowProblem)}


@every_kind
def test_every_kind_of_source_gives_the_same_rows(name: str, write: Write, tmp_path: Path) -> None:
    keeps_nulls = write in (write_jsonl, write_json, write_json_object)
    found = read(write(tmp_path / name, ROWS))
    assert [row for _, row in found] == (ROWS if keeps_nulls else READ)
    # The second row of the CSV file is on lines 3 and 4.
    assert [number for number, _ in found] == ([2, 3, 5] if write is write_csv else [1, 2, 3])


@every_kind
def test_reading_can_begin_later(name: str, write: Write, tmp_path: Path) -> None:
    source = write(tmp_path / name, ROWS * 700)
    whole = read(source)
    assert len(whole) == 2100
    for skip in (1, 1000, 1001, 2099, 2100, 5000):
        assert read(source, skip=skip) == whole[skip:]


@every_kind
def test_columns_of_other_names_are_mapped(name: str, write: Write, tmp_path: Path) -> None:
    source = write(tmp_path / name, [{"prompt": "x", "question": "Is it?", "id": "7", "strength": 3.0}])
    columns = {"prompt": "question", "uid": "id", "margin": "strength"}
    assert read(source, columns)[0][1] == {"prompt": "Is it?", "uid": "7", "margin": 3.0}


def test_columns_can_be_swapped(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"chosen": "a", "rejected": "b"}])
    assert read(source, {"chosen": "rejected", "rejected": "chosen"}) == [(1, {"chosen": "b", "rejected": "a"})]


def test_a_row_without_a_mapped_column_is_named(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"question": "a"}, {"prompt": "b"}, {}])
    assert reasons(source, {"prompt": "question"}) == {
        2: "has no 'question', which data.columns.prompt names (it has 'prompt')",
        3: "has no 'question', which data.columns.prompt names (it has nothing)",
    }


@pytest.mark.parametrize(("name", "write"), [("rows.csv", write_csv), ("rows.parquet", write_parquet)])
def test_a_mapped_column_may_be_empty_in_a_row(name: str, write: Write, tmp_path: Path) -> None:
    source = write(tmp_path / name, [{"prompt": "a", "strength": None}, {"prompt": "b", "strength": 1.0}])
    assert [row for _, row in read(source, {"margin": "strength"})] == [{"prompt": "a"}, {"prompt": "b", "margin": 1.0}]


def test_what_is_no_text_in_a_csv_cell_is_read_as_json(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hello"}]
    row = {
        "prompt": json.dumps(chat),
        "chosen": "42",
        "rejected": "[{" * 100_000,
        "label": True,
        "tie": "false",
        "ranks": [0, 1],
        "completions": json.dumps(["a", "b"]),
        "best": 1,
        "weight": "heavy",
        "margin": "",
    }
    assert read(write_csv(tmp_path / "rows.csv", [row])) == [
        (
            2,
            {
                "prompt": chat,
                "chosen": "42",
                "rejected": "[{" * 100_000,
                "label": True,
                "tie": False,
                "ranks": [0, 1],
                "completions": ["a", "b"],
                "best": 1,
                "weight": "heavy",
            },
        )
    ]


def test_nulls_within_arrow_rows_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": None}, {"role": "user", "content": "b", "name": "x"}]}
    ]
    for source in (write_parquet(tmp_path / "rows.parquet", rows), write_folder(tmp_path / "folder", rows)):
        [(_, row)] = read(source)
        assert row["messages"] == [{"role": "user", "content": "a"}, {"role": "user", "content": "b", "name": "x"}]


def test_bad_lines_of_a_csv_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'uid,text\na,"one\ntwo"\nb\n\nc,d,e\nf,"x"y\ng,\xff\nh,good\ni,"open\n')
    assert reasons(str(path)) == {
        4: "has 1 cells, but the first line names 2 columns",
        5: "is blank, but must have 2 cells",
        6: "has 3 cells, but the first line names 2 columns",
        7: "is not CSV: ',' expected after '\"'",
        8: "is not UTF-8 text",
        10: "is not CSV: unexpected end of data: a quote that opens in it is never closed",
    }
    assert [number for number, _ in read(str(path))] == [2, 4, 5, 6, 7, 8, 9, 10]


def test_bad_entries_of_a_json_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a"}, 3, {"text": {"a": 1, "a": 2}}, {"text": [NaN]}, null]')
    assert reasons(str(path)) == {
        2: "is a number, but must be a JSON object",
        3: "key 'a' stands twice",
        4: "is not JSON: NaN is no JSON value",
        5: "is null, but must be a JSON object",
    }


UNUSABLE: list[tuple[str, bytes, str]] = [
    ("rows.jsonl", b"", "is empty, but must have one JSON object a line: see data.train"),
    ("rows.json", b"[]", "has no rows: see data.train"),
    ("rows.json", b"{", "is not JSON: Expecting property name enclosed in double quotes (column 2): see data.train"),
    ("rows.json", b"[\n1,\n", "is not JSON: Expecting value (line 3, column 1): see data.train"),
    ("rows.json", b"\xff", "is not UTF-8 text (byte 1): see data.train"),
    ("rows.json", b'{"a": [], "a": 1}', "key 'a' stands twice: see data.train"),
    ("rows.json", b"3", "is a number, but must be a list of objects: see data.train"),
    (
        "rows.json",
        b'{"a": [], "b": []}',
        "is an object with 2 lists, but must have one: the list of rows: see data.train",
    ),
    ("rows.csv", b"", "has no rows: see data.train"),
    ("rows.csv", b"a,b\n", "has no rows: see data.train"),
    ("rows.csv", b"a,b,a\n1,2,3\n", "column 'a' stands twice in its first line: see data.train"),
    ("rows.csv", b"a,\xff\n", "is not UTF-8 text: see data.train"),
    ("rows.parquet", b"", "is not Parquet, or is damaged: Parquet file size is 0 bytes: see data.train"),
    (
        "rows.csv",
        b"uid;text\na;b\n",
        "has one column, 'uid;text': it seems to be separated by ';', but must be by commas: see data.train",
    ),
    (
        "rows.csv",
        b'"uid";"text"\na;b\n',
        "is not CSV: ',' expected after '\"' in its first line; commas separate its columns: see data.train",
    ),
    ("rows.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16 text: save it as UTF-8: see data.train"),
    ("rows.json", '{"text": "a"}'.encode("utf-32"), "is UTF-32 text: save it as UTF-8: see data.train"),
    (
        "rows.csv",
        "text\na\n".encode("utf-16-le"),
        "begins with a NUL byte or has one behind its first: is it UTF-16 text? Save it as UTF-8: see data.train",
    ),
    ("rows.jsonl", gzip.compress(b'{"text": "a"}'), "is compressed by gzip: unpack it: see data.train"),
    (
        "rows.jsonl.gz",
        b"a",
        "is of no known format: its name must end in .jsonl, .json, .csv or .parquet; unpack it: see data.train",
    ),
    ("rows.csv", b"PK\x03\x04a", "is a zip archive, as spreadsheets are: unpack it, or save it as CSV: see data.train"),
    ("rows.json", b"PAR1a", "is a Parquet file: let its name end in .parquet: see data.train"),
    (
        "rows.jsonl",
        b'{"text": "a"}\n' + b" " * (32 * 2**20 + 1),
        "line 2 is longer than 32 MiB, which no row may be: JSONL has one JSON object a line: see data.train",
    ),
    ("rows.txt", b"a", "is of no known format: its name must end in .jsonl, .json, .csv or .parquet: see data.train"),
]


@pytest.mark.parametrize(("name", "content", "message"), UNUSABLE)
def test_a_file_that_is_no_source_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(str(path))
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "none.csv", "none.parquet", "none", "none:train"])
def test_a_source_that_is_not_there_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(f"{tmp_path}/{name}")
    assert str(caught.value) == f"{tmp_path}/{name}: can't be read (No such file or directory): see data.train"


def test_a_missing_split_names_those_that_are_there(tmp_path: Path) -> None:
    write_splits(tmp_path / "rows", ROWS)
    assert len(read(f"{tmp_path}/rows")) == len(read(f"{tmp_path}/rows:train")) == 1
    with pytest.raises(DataError) as caught:
        read(f"{tmp_path}/rows:dev")
    assert caught.value.reason == "has no split 'dev', but 'train', 'test': name one behind a colon: see data.train"
    write_folder(tmp_path / "single", ROWS)
    with pytest.raises(DataError, match="is one data set without splits: leave out ':dev'"):
        read(f"{tmp_path}/single:dev")


def test_a_set_with_a_selection_and_a_format_gives_its_rows(tmp_path: Path) -> None:
    found = datasets.Dataset.from_list(READ).remove_columns("margin").select([2, 0]).with_format("numpy")
    found.save_to_disk(tmp_path / "rows")
    assert [row["uid"] for _, row in read(str(tmp_path / "rows"))] == ["c", "a"]


def test_a_name_of_the_hub_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str) -> datasets.DatasetDict:
        asked.append(name)
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(ROWS[:n]) for split, n in [("train", 1), ("x", 2)]}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [len(read(source)) for source in ("owner/name", "owner/name:x")] == [1, 2]
    assert asked == ["owner/name", "owner/name"]
    with pytest.raises(DataError, match="owner/name:y: has no split 'y', but 'train', 'x'"):
        read("owner/name:y")


def test_a_hub_that_cannot_be_reached_is_said_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        read("nobody/nothing")
    assert str(caught.value).startswith(
        "nobody/nothing: is no file or folder here, and can't be loaded from the Hugging Face hub (it does not "
        "answer, and it is in no cache): correct the path or name"
    )


def test_what_is_on_disk_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda name: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    write_splits(Path("owner/name"), ROWS)
    assert [len(read(source)) for source in ("owner/name", "owner/name:test")] == [1, 3]


def test_uids_and_numbers_are_named_after_the_source() -> None:
    assert [stem_of(source) for source in ("d/x.jsonl", "d/v1.0", "d/x.csv", "o/name.v2:test")] == [
        "x",
        "v1.0",
        "x",
        "name.v2:test",
    ]
    assert [unit_of(source) for source in ("x.jsonl", "x.csv", "x.json", "x.parquet", "o/n")] == [
        "line",
        "line",
        "row",
        "row",
        "row",
    ]


def test_a_uid_that_stands_twice_is_told_by_line_or_row(tmp_path: Path) -> None:
    twice = [ROWS[0], ROWS[0]]
    for source, message in [
        (write_csv(tmp_path / "rows.csv", twice), "rows.csv:3: uid 'a' stands in line 2 already"),
        (write_parquet(tmp_path / "rows.parquet", twice), "rows.parquet:2: uid 'a' stands in row 1 already"),
    ]:
        found = Findings()
        parse_rows(source, "data.train", {}, lambda *_: None, found)
        assert [str(problem)[-len(message) :] for problem in found.problems] == [message]
        assert found.read == 2


@every_kind
def test_every_kind_of_source_trains_the_same(name: str, write: Write, tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    rows = [{"messages": json.dumps(chat) if write is write_csv else chat}]
    source = write(tmp_path / name, rows)
    found = load_conversations(ConversationData(train=source), source, tokenizer)
    reference = write_jsonl(tmp_path / "reference.jsonl", [{"messages": chat}])
    expected = load_conversations(ConversationData(train=reference), reference, tokenizer)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert found.learnt.tolist() == expected.learnt.tolist()


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b'{"text": "a"}\r\n{"text": "b"}\r\n'),
        ("rows.json", b'[{"text": "a"}, {"text": "b"}]'),
        ("rows.csv", b"text\r\na\r\nb\r\n"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_first_row(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(BOM + content)
    assert [row for _, row in read(str(path))] == [{"text": "a"}, {"text": "b"}]
    assert [row for _, row in read(str(path), skip=1)] == [{"text": "b"}]


def test_a_nul_byte_is_told_of_its_line(tmp_path: Path) -> None:
    table, lines = tmp_path / "rows.csv", tmp_path / "rows.jsonl"
    table.write_bytes(b"text\ngood\nb\0d\n")
    lines.write_bytes(b'{"text": "good"}\n{"text": "b\0d"}\n')
    assert reasons(str(table)) == {3: "has a NUL byte, which no text has"}
    assert reasons(str(lines)) == {2: "is not JSON: Invalid control character at (column 12)"}


# In a process of its own, which can be ended when it waits for ever.
READ_IN_PROCESS = """
import sys
from rlhf_ray.data.sources import read_rows
try:
    print(list(read_rows(sys.argv[1], "data.train", {})))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows"])
def test_what_may_never_end_is_not_opened(name: str, tmp_path: Path) -> None:
    pipe, device = tmp_path / name, tmp_path / f"device-{name}"
    if name == "rows":
        pipe.mkdir()
        os.mkfifo(pipe / "state.json")
        expected = [(pipe, "has a file 'state.json' that is a pipe")]
    else:
        os.mkfifo(pipe)
        device.symlink_to("/dev/zero")
        expected = [(pipe, "is a pipe"), (device, "is a device")]
    for path, what in expected:
        done = subprocess.run(
            [sys.executable, "-c", READ_IN_PROCESS, path], capture_output=True, text=True, timeout=60, check=True
        )
        told = f"DataError {path}: {what}, but must be a regular file: write the rows to one: see data.train\n"
        assert done.stdout == told


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    for name, reason in [
        ("a\0.jsonl", "has a NUL character in its name"),
        ("a" * 5000 + ".jsonl", "File name too long"),
    ]:
        with pytest.raises(DataError, match=reason):
            read(str(tmp_path / name))


@every_kind
def test_a_file_that_is_cut_is_refused_and_told_of(name: str, write: Write, tmp_path: Path) -> None:
    source = write(tmp_path / name, ROWS * 50)
    folder = Path(source.removesuffix(":test"))
    for path in [folder] if folder.is_file() else [*folder.rglob("*.arrow"), *folder.rglob("state.json")]:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        if write in (write_jsonl, write_csv):  # may be cut between two rows
            assert len(read(source)) < 150
        else:
            with pytest.raises(DataError, match=f"^{re.escape(source)}: "):
                read(source)
        path.write_bytes(content)


def test_keys_that_stand_twice_among_many_are_found_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    keys = [*(f'"k{number}": 0' for number in range(300_000)), '"k299999": 1']
    path.write_text("{" + ", ".join(keys) + "}")
    assert reasons(str(path)) == {1: "key 'k299999' stands twice"}
