"""What a config names that must be found elsewhere than in it: models, data, folders."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_ray.config.jobs import Job


@dataclass(frozen=True)
class Named:
    """A folder, file or hub name in a config.

    Attributes:
        setting: its dotted path.
        value: as it stands there.
        kind: a model or data set to read, a folder that the run writes, or `scratch`, one on each node's own disk.
        role: whose ranks or engines load a model or write to a scratch folder, as `placement` names it; None for what
            the controller alone touches.
    """

    setting: str
    value: str
    kind: Literal["model", "data", "folder", "scratch"]
    role: str | None = None


def named_in(config: Job) -> Iterator[Named]:
    """Everything of that sort, a model once for each role that loads it."""
    for role in config.roles:
        if role.model is not None:
            yield Named(role.model.key, role.model.path, "model", role.placed_as)
    yield from (Named(key, value, "data") for key, value in config.data_files.items())
    yield from (Named(key, value, "folder") for key, value in config.folders.items())
    for role in config.roles:
        engine = role.model_engine
        if engine is not None and engine.nvme_path is not None:
            yield Named(f"{role.section}.engine.nvme_path", engine.nvme_path, "scratch", role.placed_as)


def local_path(named: Named, base: Path = Path()) -> Path | None:
    """The file or folder of this name, seen from `base`; None where there is none, as for the hub's names."""
    path = base / named.value
    if named.kind == "data" and not path.exists():
        # A folder of a data set may carry a split behind a colon.
        path = base / (named.value.rpartition(":")[0] or named.value)
    return path if path.exists() else None
