"""Paths in a config, and whether a run can write to them."""

import os
import re
import stat
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from rlhf_ray.config.base import shown

_LONGEST_PATH, _LONGEST_NAME = 4096, 255
# File systems in which nothing can be kept; /dev/shm is one in memory.
_NO_PLACE = ("/proc", "/sys", "/dev")
_VARIABLE = re.compile(r"\$(\w+|\{)")


def usable_path(text: str) -> str:
    """A path or a name on the hub, with a leading `~` or `~user` expanded.

    Raises:
        ValueError: no file can be called so, or who wrote it meant another than it says.
    """
    if not text.strip():
        raise ValueError("is empty, but must be a path")
    if not text.isprintable():
        raise ValueError(f"has characters that no path should have (got {shown(text)})")
    if found := _VARIABLE.search(text):
        raise ValueError(
            f"environment variables are not expanded in a config, but it has {found[0][:40]!r}: write the path out, or "
            "give this key on the command line, where the shell expands it"
        )
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"this machine has no user of that name (got {shown(text)}); a folder called so is './~…'")
    longest = max(len(name) for name in path.encode().split(b"/"))
    if longest > _LONGEST_NAME or len(path.encode()) > _LONGEST_PATH:
        raise ValueError(
            f"is too long for a file system, which takes {_LONGEST_NAME} bytes between two slashes and {_LONGEST_PATH} "
            f"in all (got {shown(text)})"
        )
    return path


def writable_path(text: str) -> str:
    """As `usable_path`, of a folder that the run writes.

    Raises:
        ValueError: also for a place that holds no folder of anybody's.
    """
    path = usable_path(text)
    if problem := _no_place(os.path.normpath(path)):
        raise ValueError(f"{problem} (got {shown(text)})")
    return path


UsablePath = Annotated[str, AfterValidator(usable_path)]
WritablePath = Annotated[str, AfterValidator(writable_path)]


def why_not_writable(folder: Path) -> str | None:
    """Why this process can't make the folder, or write to it where it is there; None when it can. Changes nothing."""
    for place in (folder, *folder.parents):
        if place.is_symlink() and not place.exists():
            return f"{place} is a link that leads nowhere"
    real = os.path.realpath(folder)
    if problem := _no_place(real):
        return problem
    for place in (Path(real), *Path(real).parents):
        try:
            mode = place.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return f"{place} can't be looked at: {error.strerror}"
        if not stat.S_ISDIR(mode):
            return "is a file, but must be a folder" if str(place) == real else f"lies below {place}, a file"
        if not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
            return f"{'it' if str(place) == real else place} can't be written to"
        return None
    return None


def _no_place(path: str) -> str | None:
    if not path.strip("/"):
        return "is the root of the file system: name a folder of its own"
    system = next((place for place in _NO_PLACE if path == place or path.startswith(f"{place}/")), None)
    if system is None or path.startswith("/dev/shm/"):
        return None
    return f"is in {system}, where nothing can be kept"
