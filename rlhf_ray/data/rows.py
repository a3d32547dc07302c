"""Rows of a JSONL file, checked. A file is used as a whole or not at all: every bad row is named at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ray.data.errors import DataError, DataErrors

_T = TypeVar("_T")


class RowProblem(Exception):
    """Raised while one row is parsed; `parse_rows` makes a `DataError` with file and line of it."""


def parse_rows(file: str, setting: str, parse: Callable[[int, dict[str, Any]], _T]) -> list[_T]:
    """Every line of a JSONL file through `parse(line number, object)`.

    Args:
        file: path; lines are counted from 1.
        setting: dotted path of the config key that names the file, for errors.
        parse: raises `RowProblem` when a row can't be used.

    Raises:
        DataErrors: lines are not JSON objects, or `parse` refused them; all are listed.
        DataError: the file can't be read or is empty.
    """
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise DataError(file, None, f"can't be read ({error.strerror}): see {setting}") from error
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    if not lines:
        raise DataError(file, None, f"is empty, but must have one JSON object a line: see {setting}")
    parsed: list[_T] = []
    errors: list[DataError] = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append(parse(number, _json_object(line)))
        except RowProblem as problem:
            errors.append(DataError(file, number, str(problem)))
    if errors:
        raise DataErrors(file, errors)
    return parsed


def _json_object(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise RowProblem("is blank, but must be a JSON object")
    try:
        value = json.loads(line.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise RowProblem(f"is not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise RowProblem(f"is not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise RowProblem(f"is not JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise RowProblem(f"is {kind_of(value)}, but must be a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RowProblem(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return values


def _no_constant(name: str) -> None:
    raise RowProblem(f"is not JSON: {name} is no JSON value")


class Uids:
    """Gives each row its uid and refuses one that was there before."""

    def __init__(self, file: str) -> None:
        self._stem = Path(file).stem
        self._line_of: dict[str, int] = {}

    def of(self, line: int, row: dict[str, Any]) -> str:
        """The row's `uid`, text or a whole number, else one from the file's name and the line.

        Raises:
            RowProblem: it is neither, is empty or stands twice.
        """
        value = row.get("uid", f"{self._stem}:{line}")
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise RowProblem(f"'uid' is {kind_of(value)}, but must be text or a whole number")
        uid = str(value)
        if not uid.strip():
            raise RowProblem("'uid' is empty")
        check_encodable(uid, "'uid'")
        if uid in self._line_of:
            raise RowProblem(f"uid {uid!r} stands in line {self._line_of[uid]} already")
        self._line_of[uid] = line
        return uid


def text_of(row: dict[str, Any], key: str) -> str:
    """The text under `key`.

    Raises:
        RowProblem: it is missing, not text or empty.
    """
    if key not in row:
        raise RowProblem(f"has no {key!r} (it has {', '.join(map(repr, row)) or 'nothing'})")
    value = row[key]
    if not isinstance(value, str):
        raise RowProblem(f"{key!r} is {kind_of(value)}, but must be text")
    if not value.strip():
        raise RowProblem(f"{key!r} is empty")
    check_encodable(value, repr(key))
    return value


def check_encodable(text: str, what: str) -> None:
    """Raise `RowProblem` for text that can't be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(f"{what} has half of a surrogate pair at character {error.start + 1}") from error


def kind_of(value: Any) -> str:
    """A JSON value's type in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
