"""Rows of a file with their numbers: JSONL, JSON, CSV, Parquet, and Arrow tables.

A reader yields the number of each row with the row, or with what is wrong with it. What is wrong with the file as a
whole is raised, as a `RowProblem` or an `OSError`: readers know no names for messages. All but `.json` files are read
as they are consumed, so that they need not fit into memory. In CSV and Arrow every row has all columns: those that are
empty in it are None.
"""

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_ray.data.errors import RowProblem
from rlhf_ray.data.rows import kind_of

Row = dict[str, Any]
Entries = Iterator[tuple[int, Row | RowProblem]]

ROWS_PER_READ = 1000


def _jsonl(path: Path, skip: int) -> Entries:
    with path.open("rb") as lines:
        for number, line in enumerate(islice(lines, skip, None), start=skip + 1):
            try:
                yield number, _json_object(line.removesuffix(b"\n"))
            except RowProblem as problem:
                yield number, problem


def _json(path: Path, skip: int) -> Entries:
    rows = _decoded(path.read_bytes(), problems_in_place=True)
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise RowProblem(f"is an object with {len(lists)} lists, but must have one: the list of rows")
        rows = lists[0]
    if isinstance(rows, RowProblem):
        raise rows
    if not isinstance(rows, list):
        raise RowProblem(f"is {kind_of(rows)}, but must be a list of objects")
    for number, row in enumerate(rows[skip:], start=skip + 1):
        try:
            if problem := _problem_in(row):
                raise problem
            yield number, _object(row)
        except RowProblem as problem:
            yield number, problem


def _csv(path: Path, skip: int) -> Entries:
    csv.field_size_limit(2**31 - 1)  # else a text may have 128 KiB
    # What is no UTF-8 is decoded to surrogates, so that it can be told of its row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise RowProblem(f"is not CSV: {error}") from error
        _check_utf8(header)
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            raise RowProblem(f"column {repeated[0]!r} stands twice in its first line")
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
                row: Row | RowProblem = _csv_row(header, cells)
            except StopIteration:
                return
            except csv.Error as error:
                row = RowProblem(f"is not CSV: {error}")
            except RowProblem as problem:
                row = problem
            if skip:
                skip -= 1
            else:
                yield number, row


def _csv_row(header: list[str], cells: list[str]) -> Row:
    if not cells:
        raise RowProblem(f"is blank, but must have {len(header)} cells")
    if len(cells) != len(header):
        raise RowProblem(f"has {len(cells)} cells, but the first line names {len(header)} columns")
    _check_utf8(cells)
    return dict(zip(header, (cell or None for cell in cells), strict=True))


def _check_utf8(cells: list[str]) -> None:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        raise RowProblem("is not UTF-8 text") from error


def _parquet(path: Path, skip: int) -> Entries:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as data, pq.ParquetFile(data) as file:
            tables = (pa.Table.from_batches([batch]) for batch in file.iter_batches(ROWS_PER_READ))
            yield from arrow_rows(tables, skip)
    except pa.ArrowInvalid as error:
        raise RowProblem(f"is not Parquet: {error}") from error


def arrow_rows(tables: Iterator[Any], skip: int) -> Entries:
    """Rows of `pyarrow.Table`s, without the first `skip`."""
    number = 0
    for table in tables:
        left = max(0, min(skip - number, len(table)))
        number += left
        for row in table.slice(left).to_pylist():
            number += 1
            yield number, {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """Objects of a column have all keys that any of them has, and null where they have none."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _json_object(line: bytes) -> Row:
    if not line.strip():
        raise RowProblem("is blank, but must be a JSON object")
    return _object(_decoded(line))


def _object(value: Any) -> Row:
    if not isinstance(value, dict):
        raise RowProblem(f"is {kind_of(value)}, but must be a JSON object")
    return value


def _decoded(text: bytes, *, problems_in_place: bool = False) -> Any:
    """JSON as values. A key that stands twice or a number that is none is a `RowProblem`; with `problems_in_place` it
    is not raised, but stands where the value would, since nobody knows yet which row that is."""

    def tell(problem: RowProblem) -> RowProblem:
        if problems_in_place:
            return problem
        raise problem

    def unique_keys(pairs: list[tuple[str, Any]]) -> Row | RowProblem:
        values = dict(pairs)
        if len(values) == len(pairs):
            return values
        keys = [key for key, _ in pairs]
        return tell(RowProblem(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice"))

    def no_constant(name: str) -> RowProblem:
        return tell(RowProblem(f"is not JSON: {name} is no JSON value"))

    try:
        return json.loads(text.decode(), object_pairs_hook=unique_keys, parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise RowProblem(f"is not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise RowProblem(f"is not JSON: {error.msg} ({line}column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise RowProblem(f"is not JSON that can be read: {error}") from error


def _problem_in(value: Any) -> RowProblem | None:
    left = [value]
    while left:
        inner = left.pop()
        if isinstance(inner, RowProblem):
            return inner
        if isinstance(inner, dict | list):
            left.extend(inner.values() if isinstance(inner, dict) else inner)
    return None


# By the end of a file's name: reads a path, without its first rows.
FORMATS: dict[str, Callable[[Path, int], Entries]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
