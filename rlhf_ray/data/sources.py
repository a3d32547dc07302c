"""Rows of a data set with their numbers, wherever it comes from, under the names that this package has for its columns.

A source is a string:

- a path that ends in `.jsonl`, `.json` (a list of objects, or an object whose one list they are), `.csv` or `.parquet`;
- a folder that `datasets.save_to_disk` wrote;
- `owner/name`, a data set of the Hugging Face hub. What exists on disk is never taken for one.

Folders and names may end in `:split`; without it the split is `train`. Rows are numbered as a person would look for
them: by line in JSONL and CSV, else from 1. A source is used as a whole or not at all, so loaders go on after a bad row
and name all of them at once.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ray.config.data import ComparisonData, ConversationData
from rlhf_ray.data.errors import DataError, Findings, KnownProblem, RowProblem
from rlhf_ray.data.formats import (
    FORMATS,
    ROWS_PER_READ,
    Entries,
    Row,
    arrow_rows,
    check_regular,
    damage_told,
    file_rows,
)
from rlhf_ray.data.hub import reach_hub, tell_of_cache
from rlhf_ray.data.rows import uid_of

_T = TypeVar("_T")

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")
# A cell of a CSV file is text, but these are read as JSON.
_NOT_TEXT = frozenset(
    {"messages", "completions", "ranks", "best", "label", "tie", "margin", "chosen_rating", "rejected_rating", "weight"}
)


def parse_rows(
    source: str, setting: str, columns: Mapping[str, str], parse: Callable[[int, str, Row], _T], found: Findings
) -> list[_T]:
    """Every row of a source through `parse(number, uid, row)`.

    Args:
        setting: dotted path of the config key that names the source, for errors.
        columns: as in the config: our name of a column → the source's.
        parse: raises `RowProblem` when a row can't be used.
        found: gets the number of rows, and what is wrong with those that are left out.

    Raises:
        DataError: the source can't be read or is empty.
    """
    number_of: dict[str, int] = {}
    parsed: list[_T] = []
    for number, row in read_rows(source, setting, columns):
        found.read += 1
        try:
            if isinstance(row, RowProblem):
                raise row
            uid = uid_of(stem_of(source), number, row)
            if number_of.setdefault(uid, number) != number:
                raise RowProblem(f"uid {uid!r} stands in {unit_of(source)} {number_of[uid]} already")
            parsed.append(parse(number, uid, row))
        except KnownProblem:
            continue
        except RowProblem as problem:
            found.problems.append(DataError(source, number, str(problem)))
    return parsed


def read_rows(source: str, setting: str, columns: Mapping[str, str], skip: int = 0) -> Entries:
    """Rows with their numbers, one after the other, so that not all need fit into memory (but those of a `.json` file).

    Args:
        setting, columns: as for `parse_rows`.
        skip: rows at the beginning to leave out.

    Yields:
        The number of a row, and the row or what is wrong with it.

    Raises:
        DataError: the source can't be read or is empty.
    """
    found = False
    suffix = Path(source).suffix.lower()
    try:
        for number, row in _entries(source, skip):
            found = True
            try:
                yield number, row if isinstance(row, RowProblem) else _named(row, columns, suffix)
            except RowProblem as problem:
                yield number, problem
    except RowProblem as problem:
        raise DataError(source, None, f"{problem}: see {setting}") from problem
    except OSError as error:
        raise DataError(source, None, f"can't be read ({error.strerror or error}): see {setting}") from error
    if not found and not skip:
        what = "is empty, but must have one JSON object a line" if source.endswith(".jsonl") else "has no rows"
        raise DataError(source, None, f"{what}: see {setting}")


def unit_of(source: str) -> str:
    """What the numbers of a source's rows count."""
    return "line" if Path(source).suffix.lower() in (".jsonl", ".csv") else "row"


def stem_of(source: str) -> str:
    """What the uids of rows that have none begin with."""
    path = Path(source)
    return path.stem if path.suffix.lower() in FORMATS else path.name


def setting_of(config: ComparisonData | ConversationData, source: str) -> str:
    """Dotted path of the config key that names a source."""
    return "data.eval" if config.eval is not None and Path(config.eval) == Path(source) else "data.train"


def _named(row: Row, columns: Mapping[str, str], suffix: str) -> Row:
    """The row under our names, and but for JSON without the columns that are empty in it."""
    for own, theirs in columns.items():
        if theirs not in row:
            has = ", ".join(map(repr, row)) or "nothing"
            raise RowProblem(f"has no {theirs!r}, which data.columns.{own} names (it has {has})")
    if columns:
        taken = {*columns, *columns.values()}
        mapped = {own: row[theirs] for own, theirs in columns.items()}
        row = mapped | {key: value for key, value in row.items() if key not in taken}
    if suffix in (".jsonl", ".json"):
        return row
    return {k: _cell(k, v) if suffix == ".csv" else v for k, v in row.items() if v is not None}


def _cell(key: str, text: str) -> Any:
    """The value of a cell: text, unless its column is of another kind or it is a list of chat messages."""
    if key not in _NOT_TEXT and not text.startswith("[{"):
        return text
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except (ValueError, RecursionError):
        return text


def _entries(source: str, skip: int) -> Entries:
    """Rows under the source's own names.

    Raises:
        RowProblem: the source as a whole can't be used.
        OSError: it can't be read.
    """
    if "\0" in source:
        raise RowProblem("has a NUL character in its name")
    path = Path(source)
    if path.suffix.lower() in FORMATS and not path.is_dir():
        return file_rows(path, skip)
    name, split = _without_split(source)
    if Path(name).is_dir():
        return _saved(name, split, skip)
    if path.exists():
        packed = "; unpack it" if path.suffix.lower() in (".gz", ".bz2", ".xz", ".zst", ".zip") else ""
        raise RowProblem(f"is of no known format: its name must end in .jsonl, .json, .csv or .parquet{packed}")
    if not _HUB_NAME.fullmatch(source):
        raise FileNotFoundError(2, "No such file or directory")
    return _from_hub(name, split, skip)


def _without_split(source: str) -> tuple[str, str]:
    name, colon, split = source.rpartition(":")
    return (name, split) if colon and not Path(source).exists() else (source, "")


def _saved(folder: str, split: str, skip: int) -> Entries:
    import datasets

    for pattern in ("*", "*/*"):
        for path in Path(folder).glob(pattern):
            if path.exists():
                check_regular(path, f"has a file {str(path.relative_to(folder))!r} that")
    try:
        found = datasets.load_from_disk(folder)
    except FileNotFoundError as error:
        raise RowProblem("is a folder, but none that `datasets.save_to_disk` wrote") from error
    except OSError:
        raise
    except Exception as error:  # what stands in its files can be anything
        reason = str(error).strip().partition("\n")[0]
        raise RowProblem(f"is a folder, but none that `datasets.save_to_disk` wrote, or damaged ({reason})") from error
    return _dataset_rows(found, split, skip)


def _from_hub(name: str, split: str, skip: int) -> Entries:
    import datasets

    reached = reach_hub()
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # scripts, servers and caches raise what they like
        reason = str(error).strip().partition("\n")[0] if reached else "it does not answer, and it is in no cache"
        raise RowProblem(
            f"is no file or folder here, and can't be loaded from the Hugging Face hub ({reason}): correct the path or "
            "name, log in if it is private, or where there is a network save it with `datasets.load_dataset(…)"
            ".save_to_disk(…)` and name that folder"
        ) from error
    if not reached:
        tell_of_cache(name)
    return _dataset_rows(found, split, skip)


def _dataset_rows(found: Any, split: str, skip: int) -> Entries:
    """Rows of a `datasets.Dataset`, or of a split of a `datasets.DatasetDict`."""
    if isinstance(found, dict):
        wanted = split or "train"
        if wanted not in found:
            raise RowProblem(f"has no split {wanted!r}, but {', '.join(map(repr, found))}: name one behind a colon")
        found = found[wanted]
    elif split:
        raise RowProblem(f"is one data set without splits: leave out ':{split}'")
    with damage_told("has rows that can't be read"):
        yield from arrow_rows(found.with_format("arrow").iter(ROWS_PER_READ), skip)
