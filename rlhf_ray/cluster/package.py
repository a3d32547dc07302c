"""What of a working directory goes to the cluster with a job.

Left out are what the `.gitignore` and `.rayignore` files of the folder name, as Ray does it, and `LEFT_OUT`: results,
models, data, weights and environments, which are large and are either on storage that every node sees or not meant for
the cluster at all.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import normpath
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes

from rlhf_ray.cluster.named_paths import local_path, named_in
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.yaml_text import word_in_yaml

LEFT_OUT = (
    *("/runs", "/models", "/data"),
    *("**/checkpoints/step_*", "*.safetensors", "*.gguf"),
    *(".git", ".venv", "venv", "__pycache__", ".*_cache", "*.egg-info"),
)
"""Patterns as in `.gitignore`; what begins with a slash counts in the folder itself only."""

_SHOWN = 5
_MIB = 2**20


class PackageTooLarge(Exception):
    """The files of a working directory are more than Ray takes.

    Attributes:
        folder: that was to be sent.
        size, limit: bytes.
        largest: path within the folder and bytes of the largest files.
    """

    def __init__(self, folder: Path, size: int, limit: int, largest: Sequence[tuple[Path, int]]) -> None:
        self.folder, self.size, self.limit, self.largest = folder, size, limit, list(largest)
        listing = "".join(f"\n  {_mib(each)}  {path}" for path, each in self.largest)
        super().__init__(
            f"{folder}: its files are {_mib(size)}, more than the {_mib(limit)} that Ray takes. Leave some out with "
            "--exclude PATTERN, a .gitignore or a .rayignore, or put them on storage that every node sees. "
            f"The largest:{listing}"
        )

    def __reduce__(self) -> tuple[type["PackageTooLarge"], tuple[Path, int, int, list[tuple[Path, int]]]]:
        return type(self), (self.folder, self.size, self.limit, self.largest)


@dataclass(frozen=True)
class Package:
    """What is sent.

    Attributes:
        folder: working directory.
        files: within it, sorted.
        size: bytes of the files.
    """

    folder: Path
    files: tuple[Path, ...]
    size: int

    def __str__(self) -> str:
        return f"{len(self.files):,} files of {self.folder} ({_mib(self.size)})"

    def write(self, path: Path) -> None:
        """Write it as a zip archive; the same files give the same bytes, which Ray then does not upload again."""
        with ZipFile(path, "w", ZIP_DEFLATED, strict_timestamps=False) as archive:
            for file in self.files:
                info = ZipInfo.from_file(self.folder / file, str(file), strict_timestamps=False)
                info.compress_type = ZIP_DEFLATED
                archive.writestr(info, (self.folder / file).read_bytes())


def package(folder: Path, left_out: Sequence[str] = (), limit: int = GCS_STORAGE_MAX_SIZE) -> Package:
    """Choose the files of a working directory, reading none of them.

    Args:
        left_out: patterns beyond `LEFT_OUT`.
        limit: bytes that Ray takes.

    Raises:
        PackageTooLarge: naming the largest files.
    """
    folder = folder.resolve()
    sizes: dict[Path, int] = {}

    def count(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(folder)] = path.stat().st_size

    # Ray tells of every ignore file it finds; those are the user's own.
    silent = logging.Logger("packaging", logging.CRITICAL)
    _dir_travel(folder, [_get_excludes(folder, [*LEFT_OUT, *left_out])], count, include_gitignore=True, logger=silent)
    total = sum(sizes.values())
    if total >= limit:
        largest = sorted(sizes.items(), key=lambda entry: -entry[1])[:_SHOWN]
        raise PackageTooLarge(folder, total, limit, largest)
    return Package(folder, tuple(sorted(sizes)), total)


@dataclass(frozen=True)
class Pinned:
    """A relative path of a config that means another place in the job than here.

    Attributes:
        setting: its dotted path.
        value: as it stands in the config.
        path: where it is, absolute.
    """

    setting: str
    value: str
    path: str

    @property
    def override(self) -> str:
        """`key=value` that says so."""
        return f"{self.setting}={word_in_yaml(self.path)}"


def pinned_paths(config: Job, content: Package) -> list[Pinned]:
    """Relative paths that a job must not look for in its copy of the working directory: files and folders that are here
    but are not sent, and what the run writes, since Ray removes the copy some time after the job.

    Absolute, they are the same place on every node as long as it is on storage that all see.
    """
    sent = {content.folder / part for file in content.files for part in (file, *file.parents)}
    pinned: dict[str, Pinned] = {}
    for named in named_in(config):
        here = local_path(named, content.folder)
        left_out = here is not None and Path(normpath(here)) not in sent
        if not Path(named.value).is_absolute() and (named.kind in ("folder", "scratch") or left_out):
            pinned[named.setting] = Pinned(named.setting, named.value, normpath(content.folder / named.value))
    return list(pinned.values())


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f} MiB"
