"""Folders that the run writes: that they can be written, are the same everywhere, and have room."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_ray.cluster.named_paths import named_in
from rlhf_ray.cluster.preflight.asked import describe_bytes, disk_need
from rlhf_ray.cluster.preflight.judge import judge_disk, judge_folder, judge_shared
from rlhf_ray.cluster.preflight.report import Check
from rlhf_ray.cluster.preflight.view import View
from rlhf_ray.cluster.topology import Node
from rlhf_ray.models.shapes import ShapeError

_ANSWER_S = 8.0
_PATIENCE_S = 4.0


def check_storage(view: View) -> Iterator[Check]:
    """Write a small file from this process's node, look for it on the others that will write, and remove it."""
    writers = view.of((role.placed_as for role in view.config.roles if role.checkpointed), with_home=True)
    problems: list[str] = []
    free: dict[str, int] = {}
    for named in named_in(view.config):
        if named.kind == "folder":
            nodes = writers if named.setting == "run.dir" else [view.home]
            free_there, found = _try_folder(view, named.setting, str(Path(named.value).absolute()), nodes)
            problems += found
            if named.setting == "run.dir":
                free = free_there
        elif named.kind == "scratch" and named.role is not None:
            problems += _try_scratch(view, named.setting, named.value, view.of([named.role]))
    names = ", ".join(node.name for node in writers)
    yield Check("storage", f"{view.config.run.dir} is one folder for {names}", tuple(problems))
    yield _disk(view, free)


def _try_folder(view: View, setting: str, folder: str, nodes: list[Node]) -> tuple[dict[str, int], list[str]]:
    """Bytes that are free there by node, and problems."""
    name, text = f".preflight-{secrets.token_hex(8)}", secrets.token_hex(8)
    home, others = view.home.name, [node.name for node in nodes if node.name != view.home.name]
    written, refused = view.probes.ask("write", {home: (folder, name, text)}, _ANSWER_S)
    if home not in written:
        return {}, list(judge_folder(setting, folder, refused))
    try:
        read, unreadable = view.probes.ask("read", dict.fromkeys(others, (folder, name, text, _PATIENCE_S)), _ANSWER_S)
        blind = [other for other in others if other in unreadable or read.get(other) is False]
        sharing = [other for other in others if read.get(other)]
        own = {other: (folder, f"{name}-{number}", text) for number, other in enumerate(sharing)}
        written_there, refused = view.probes.ask("write", own, _ANSWER_S)
        view.probes.ask("remove", {other: (folder, own[other][1], []) for other in written_there}, _ANSWER_S)
    finally:
        view.probes.ask("remove", {home: (folder, name, written[home]["made"])}, _ANSWER_S)
    free: dict[str, Any] = {node: answer["free"] for node, answer in (written | written_there).items()}
    return free, [*judge_shared(setting, folder, home, blind), *judge_folder(setting, folder, refused)]


def _try_scratch(view: View, setting: str, folder: str, nodes: list[Node]) -> list[str]:
    """Problems of a folder that each node has for itself."""
    name = f".preflight-{secrets.token_hex(8)}"
    written, refused = view.probes.ask("write", {node.name: (folder, name, "") for node in nodes}, _ANSWER_S)
    view.probes.ask("remove", {node: (folder, name, answer["made"]) for node, answer in written.items()}, _ANSWER_S)
    return list(judge_folder(setting, folder, refused))


def _disk(view: View, free: dict[str, int]) -> Check:
    folder = Path(view.config.run.dir).absolute()
    try:
        need = disk_need(view.config)
    except ShapeError as error:
        return Check("disk", f"how much a checkpoint takes is not known: {error}", skipped=True)
    if not free:
        return Check("disk", f"{folder} could not be written", skipped=True)
    there = _size(folder / "checkpoints") + _size(folder / "export")
    problems = judge_disk("run.dir", str(folder), need, there, free)
    return Check("disk", f"{describe_bytes(min(free.values()))} free, {need.what} at most", tuple(problems))


def _size(folder: Path) -> int:
    return sum(os.lstat(os.path.join(place, file)).st_size for place, _, files in os.walk(folder) for file in files)
