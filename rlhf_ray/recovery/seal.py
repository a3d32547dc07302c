"""A sealed folder: `COMMITTED`, written last, holds size and checksum of every file in it."""

import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf_ray.recovery.files import replace_file, sync

COMMITTED = "COMMITTED"
_BLOCK_BYTES = 4 << 20
# Reading and checksums leave the interpreter lock, so the files of many ranks are read at the disk's speed.
_READERS = 8


class CheckpointError(Exception):
    """A checkpoint that cannot be written or trusted.

    Attributes:
        folder: of the checkpoint.
        reason: what is wrong with it.
    """

    def __init__(self, folder: Path, reason: str) -> None:
        self.folder = folder
        self.reason = reason
        super().__init__(f"{folder}: {reason}")

    def __reduce__(self) -> tuple[type["CheckpointError"], tuple[Path, str]]:
        return type(self), (self.folder, self.reason)


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    size: int
    crc32: int


class _Seal(BaseModel):
    """Content of `COMMITTED`; files by their path relative to the folder."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal[1]
    step: int
    files: dict[str, _File]


def seal(folder: Path, step: int) -> None:
    """Bring all that the folder holds to disk, then vouch for it.

    Raises:
        CheckpointError: it holds something other than files and folders.
    """
    for leftover in folder.glob(f".{COMMITTED}.*"):  # of a seal that failed
        leftover.unlink()
    files, folders = _contents(folder)
    with ThreadPoolExecutor(_READERS) as pool:
        facts = pool.map(_synced, files)
        names = [file.relative_to(folder).as_posix() for file in files]
        content = _Seal(format=1, step=step, files=dict(zip(names, facts, strict=True)))
    # The last two make the folder itself last: run_dir/checkpoints, and run_dir that may have just got it.
    for changed in (*folders, folder, folder.parent, folder.parent.parent):
        sync(changed)
    replace_file(folder / COMMITTED, content.model_dump_json().encode())


def is_sealed(folder: Path) -> bool:
    """Whether the folder was written to its end; `verify` says whether it still is as it was then."""
    return (folder / COMMITTED).is_file()


def verify(folder: Path, step: int) -> None:
    """Read every file and compare it with what was sealed.

    Raises:
        CheckpointError: the folder is not complete, or not as it was sealed.
    """
    try:
        content = _Seal.model_validate_json((folder / COMMITTED).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(folder, f"no {COMMITTED}, so it was not written to its end") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(folder, f"{COMMITTED} unreadable: {where}{': ' if where else ''}{first['msg']}") from None
    except OSError as error:
        raise CheckpointError(folder, f"{COMMITTED} unreadable: {error}") from None
    if content.step != step:
        raise CheckpointError(folder, f"{COMMITTED} unreadable: it is of step {content.step}")

    for name, file in content.files.items():  # all sizes before the first of many gigabytes is read
        try:
            size = (folder / name).stat().st_size
        except OSError:
            raise CheckpointError(folder, f"missing file {name}") from None
        if size != file.size:
            raise CheckpointError(folder, f"wrong size: {name} has {size} bytes, {file.size} were written")
    try:
        with ThreadPoolExecutor(_READERS) as pool:
            checksums = list(pool.map(_crc32, [folder / name for name in content.files]))
    except OSError as error:
        raise CheckpointError(folder, f"unreadable file: {error}") from None
    for (name, file), checksum in zip(content.files.items(), checksums, strict=True):
        if checksum != file.crc32:
            raise CheckpointError(folder, f"checksum differs: {name}")


def remove(folder: Path) -> None:
    """`COMMITTED` goes first, so that a folder half removed never looks complete."""
    (folder / COMMITTED).unlink(missing_ok=True)
    sync(folder)
    shutil.rmtree(folder)


def _contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files and folders below `folder`; an inner folder comes before the one that holds it."""
    files: list[Path] = []
    folders: list[Path] = []
    for parent, inner, names in os.walk(folder, topdown=False):
        folders += (Path(parent, name) for name in inner)
        files += (Path(parent, name) for name in names)
    for path in (*files, *folders):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(folder, f"holds {path.relative_to(folder)}, which is neither a file nor a folder")
    return sorted(files), folders


def _synced(path: Path) -> _File:
    sync(path)
    return _File(size=path.stat().st_size, crc32=_crc32(path))


def _crc32(path: Path) -> int:
    checksum = 0
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            checksum = zlib.crc32(block[:count], checksum)
    return checksum
