"""What a row may hold: its uid, its texts, its numbers. What is wrong with it is a `RowProblem`."""

from collections.abc import Iterator
from typing import Any

from rlhf_ray.data.errors import RowProblem


def uid_of(stem: str, number: int, row: dict[str, Any]) -> str:
    """The row's `uid`, text or a whole number, else one from the stem and the row's number.

    Raises:
        RowProblem: it is neither, or is empty.
    """
    value = row.get("uid", f"{stem}:{number}")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowProblem(f"'uid' is {kind_of(value)}, but must be text or a whole number")
    uid = str(value)
    if not uid.strip():
        raise RowProblem("'uid' is empty")
    check_encodable(uid, "'uid'")
    return uid


def value_of(row: dict[str, Any], key: str) -> Any:
    """What stands under `key`.

    Raises:
        RowProblem: nothing does.
    """
    if key not in row:
        has = ", ".join(map(repr, row)) or "nothing"
        raise RowProblem(f"has no {key!r} (it has {has}): if its column has another name, say so in data.columns")
    return row[key]


def text_of(row: dict[str, Any], key: str) -> str:
    """The text under `key`.

    Raises:
        RowProblem: it is missing, not text or empty.
    """
    return checked_text(value_of(row, key), key)


def checked_text(value: Any, key: str) -> str:
    """`value`, when it is text that is not empty.

    Raises:
        RowProblem: it is not.
    """
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


def nested(value: Any) -> Iterator[tuple[Any, int]]:
    """A value and all values within it, each with its depth: 1 for the value itself. Without recursion, so that the
    depth has no limit."""
    left = [(value, 1)]
    while left:
        inner, depth = left.pop()
        yield inner, depth
        if isinstance(inner, dict | list | tuple):
            left.extend((each, depth + 1) for each in (inner.values() if isinstance(inner, dict) else inner))


def kind_of(value: Any) -> str:
    """A value's type in words."""
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"of type {type(value).__name__}")
