"""Rows of a file with their numbers: JSONL, JSON, CSV, Parquet, and Arrow tables.

A reader yields the number of each row with the row, or with what is wrong with it. What is wrong with the file as a
whole is raised, as a `RowProblem` or an `OSError`: readers know no names for messages. All but `.json` files are read
as they are consumed, so that they need not fit into memory. In CSV and Arrow every row has all columns: those that are
empty in it are None. Only regular files are read, and no row is longer or nested deeper than a limit, so that every
source comes to an end.
"""

import codecs
import csv
import json
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rlhf_ray.data.errors import RowProblem
from rlhf_ray.data.rows import kind_of, nested

Row = dict[str, Any]
Entries = Iterator[tuple[int, Row | RowProblem]]

ROWS_PER_READ = 1000
# A row of so many bytes is beyond any token budget: more often it is a file of another kind.
_LONGEST_ROW = 32 * 2**20
# A `.json` file takes about five times its size in memory.
_LONGEST_JSON = 4 * 2**30
# Values within values. What goes on with a row walks through it function by function.
_DEEPEST = 100
_TOO_DEEP = f"has values nested deeper than {_DEEPEST}"

# What a file begins with that is none of what its name says.
_OTHER_KINDS = {
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"PK\x03\x04": "a zip archive, as spreadsheets are: unpack it, or save it as CSV",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    b"PAR1": "a Parquet file: let its name end in .parquet",
    codecs.BOM_UTF32_LE: "UTF-32 text: save it as UTF-8",
    codecs.BOM_UTF32_BE: "UTF-32 text: save it as UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16 text: save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16 text: save it as UTF-8",
}


def file_rows(path: Path, skip: int) -> Entries:
    """Rows of a file by the end of its name, one of `FORMATS`, without the first `skip`.

    Raises:
        RowProblem: it is no regular file, or of another kind than its name says.
        OSError: it can't be read.
    """
    suffix = path.suffix.lower()
    check_regular(path)
    if suffix != ".parquet":
        with path.open("rb") as file:
            head = file.read(4)
        for mark, kind in _OTHER_KINDS.items():
            if head.startswith(mark):
                raise RowProblem(f"is {kind}")
        if head[1:2] == b"\0" or head[:1] == b"\0":
            raise RowProblem("begins with a NUL byte or has one behind its first: is it UTF-16 text? Save it as UTF-8")
    return FORMATS[suffix](path, skip)


def check_regular(path: Path, name: str = "") -> None:
    """Raise `RowProblem` for what opens like a file but may never end: a pipe, a device, a socket.

    Args:
        name: what the message calls it, where it is not the source itself.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return
    kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device", stat.S_ISSOCK: "a socket"}
    kind = next((name for is_kind, name in kinds.items() if is_kind(mode)), "something else")
    raise RowProblem(f"{name and name + ' '}is {kind}, but must be a regular file: write the rows to one")


def _jsonl(path: Path, skip: int) -> Entries:
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            if number <= skip:
                continue
            try:
                if not line.strip():
                    raise RowProblem("is blank, but must be a JSON object")
                yield number, _checked(_decoded(line.removesuffix(b"\n")))
            except RowProblem as problem:
                yield number, problem


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines without a byte-order mark.

    Raises:
        RowProblem: one is too long for a row, so that the file is of no lines.
    """
    number = 0
    while line := file.readline(_LONGEST_ROW + 1):
        number += 1
        if len(line) > _LONGEST_ROW:
            raise RowProblem(
                f"line {number} is longer than {_LONGEST_ROW // 2**20} MiB, which no row may be: JSONL has one JSON "
                "object a line"
            )
        yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _json(path: Path, skip: int) -> Entries:
    if (size := path.stat().st_size) > _LONGEST_JSON:
        raise RowProblem(
            f"has {size / 2**30:.1f} GiB, but a .json file is read as a whole and may have "
            f"{_LONGEST_JSON // 2**30} GiB: make it JSONL or Parquet"
        )
    rows = _decoded(path.read_bytes().removeprefix(codecs.BOM_UTF8), problems_in_place=True)
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
            yield number, _checked(row)
        except RowProblem as problem:
            yield number, problem


def _csv(path: Path, skip: int) -> Entries:
    csv.field_size_limit(_LONGEST_ROW)  # else a text may have 128 KiB
    # What is no UTF-8 is decoded to surrogates, so that it can be told of its row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise RowProblem(f"is not CSV: {error} in its first line; commas separate its columns") from error
        _check_utf8(header)
        if len(header) == 1 and (others := [mark for mark in (";", "\t", "|") if mark in header[0]]):
            raise RowProblem(
                f"has one column, {_shown(header[0])}: it seems to be separated by {others[0]!r}, but must be by commas"
            )
        if repeated := sorted(name for name, count in Counter(header).items() if count > 1):
            raise RowProblem(f"column {_shown(repeated[0])} stands twice in its first line")
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
                row: Row | RowProblem = _csv_row(header, cells)
            except StopIteration:
                return
            except csv.Error as error:
                open_quote = any(told in str(error) for told in ("unexpected end of data", "field larger"))
                cause = ": a quote that opens in it is never closed" if open_quote else ""
                row = RowProblem(f"is not CSV: {error}{cause}")
            except RowProblem as problem:
                row = problem
            if skip:
                skip -= 1
            else:
                yield number, row


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:80] + "…")


def _csv_row(header: list[str], cells: list[str]) -> Row:
    if not cells:
        raise RowProblem(f"is blank, but must have {len(header)} cells")
    if len(cells) != len(header):
        raise RowProblem(f"has {len(cells)} cells, but the first line names {len(header)} columns")
    _check_utf8(cells)
    return dict(zip(header, (cell or None for cell in cells), strict=True))


def _check_utf8(cells: list[str]) -> None:
    text = "".join(cells)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem("is not UTF-8 text") from error
    if "\0" in text:
        raise RowProblem("has a NUL byte, which no text has")


def _parquet(path: Path, skip: int) -> Entries:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with damage_told("is not Parquet, or is damaged"), path.open("rb") as data, pq.ParquetFile(data) as file:
        tables = (pa.Table.from_batches([batch]) for batch in file.iter_batches(ROWS_PER_READ))
        yield from arrow_rows(tables, skip)


@contextmanager
def damage_told(what: str) -> Iterator[None]:
    """What Arrow can't read is a `RowProblem` that begins with `what`."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, ValueError, OverflowError, RecursionError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # Arrow tells damage so, too, without a number
            raise
        raise RowProblem(f"{what}: {error}") from error


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


def _checked(value: Any) -> Row:
    """The value, when it is an object without problems in it that is not nested too deep."""
    for inner, depth in nested(value):
        if isinstance(inner, RowProblem):
            raise inner
        if depth > _DEEPEST and isinstance(inner, dict | list):
            raise RowProblem(_TOO_DEEP)
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
        counts = Counter(key for key, _ in pairs)
        return tell(RowProblem(f"key {next(key for key, count in counts.items() if count > 1)!r} stands twice"))

    def no_constant(name: str) -> RowProblem:
        return tell(RowProblem(f"is not JSON: {name} is no JSON value"))

    try:
        return json.loads(text.decode(), object_pairs_hook=unique_keys, parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise RowProblem(f"is not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise RowProblem(f"is not JSON: {error.msg} ({line}column {error.colno})") from error
    except RecursionError as error:
        raise RowProblem(_TOO_DEEP) from error
    except ValueError as error:  # a number of thousands of digits
        raise RowProblem(f"is not JSON that can be read: {error}") from error


# By the end of a file's name: reads a path, without its first rows.
FORMATS: dict[str, Callable[[Path, int], Entries]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
