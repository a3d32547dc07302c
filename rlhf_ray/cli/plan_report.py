"""A plan as tables, or as JSON."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_ray.cluster.planner.changes import Change
from rlhf_ray.cluster.planner.footprint import Item, total
from rlhf_ray.cluster.planner.hardware import Hardware
from rlhf_ray.cluster.planner.memory import MemoryPlan, Shelf, Tenant
from rlhf_ray.config.number_formats import NumberFormats
from rlhf_ray.telemetry.progress import QuietConsole

GIB = 2**30
TIGHT = 0.05
"""Share of a device or node below which what is left is told to be little."""

COLUMNS = {
    "weights": ("weights", "weights kept whole", "gathered weights", "adapters", "weights on their way to the device"),
    "optimizer": ("master weights", "optimizer moments", "offload buffers"),
    "gradients": ("gradients", "gradients for the step", "reduce buffers"),
    "passes": ("activations", "logits and states", "pass", "sync bucket"),
    "KV cache": ("KV cache",),
}
"""What is told in one column; all else is `process`."""


def print_plan(plan: MemoryPlan, hardware: Hardware, changes: Sequence[Change]) -> None:
    """Tables on stdout."""
    console = QuietConsole()
    if not console.is_terminal:
        console = QuietConsole(width=160)
    _print_table(console, f"Memory on {hardware.name}, in GiB, when it is most", _memory_table(plan))
    for shelves in _alike(plan.shelves):
        if _is_shared(shelves[0]):
            title = f"{_where(shelves)}, stage by stage: what each role needs"
            _print_table(console, title, _stage_table(plan, shelves))
    for line in _verdict(plan, changes):
        console.print(line, soft_wrap=True)


def _told_formats(formats: NumberFormats) -> dict[str, object]:
    """Number formats for JSON."""
    return {"number_formats": formats.content(), "warnings": list(formats.warnings)}


def to_json(
    plan: MemoryPlan,
    hardware: Hardware,
    changes: Sequence[Change],
    formats: NumberFormats,
    time: Mapping[str, object],
) -> str:
    """The same for programs; sizes in bytes.

    Args:
        time: of a step.
    """
    engine = plan.engine
    return json.dumps(
        {
            "cluster": hardware.name,
            "fits": plan.fits,
            "problems": plan.problems,
            **_told_formats(formats),
            "stages": [stage.name for stage in plan.stages],
            "memory": [_shelf_json(shelf) for shelf in plan.shelves],
            "object_store": {"needed": plan.store_needed, "capacity": plan.store},
            "engine": engine and {"cached_tokens": engine.cached_tokens, "wanted_tokens": engine.wanted_tokens},
            "changes": [change.arguments for change in changes],
            "time": time,
        },
        indent=2,
    )


def _shelf_json(shelf: Shelf) -> dict[str, object]:
    return {
        "node": shelf.node,
        "device": shelf.device,
        "kind": shelf.kind,
        "capacity": shelf.capacity,
        "held": shelf.held,
        "headroom": shelf.headroom,
        "fits": shelf.fits,
        "roles": [
            {
                "role": tenant.role,
                "rank": tenant.rank,
                "held": max(tenant.held),
                "stages": list(tenant.used),
                "parts": {name: total(items) for name, items in _by_name(tenant.parts)},
            }
            for tenant in shelf.tenants
        ],
    }


def _by_name(items: Iterable[Item]) -> Iterator[tuple[str, list[Item]]]:
    ordered = sorted(items, key=lambda item: item.name)
    for name, same in groupby(ordered, key=lambda item: item.name):
        yield name, list(same)


def _memory_table(plan: MemoryPlan) -> Table:
    table = _table()
    for name in ("where", "role", "ranks"):
        table.add_column(name)
    for name in (*COLUMNS, "process", "together", "of", "left"):
        table.add_column(name, justify="right")
    table.add_column("")
    for shelves in _alike(plan.shelves):
        shelf, where = shelves[0], _where(shelves)
        rows = _by_role(shelves)
        for number, (role, ranks, tenant) in enumerate(rows):
            parts = [_gib(size) for size in _columns(tenant.parts)]
            table.add_row(where if number == 0 else "", role, ranks, *parts, _gib(max(tenant.held)))
        told, style = _told(shelf)
        nothing = [""] * (len(COLUMNS) + 1)
        sums = (_gib(shelf.held), _gib(shelf.capacity), _gib(shelf.headroom))
        name = "" if rows else where
        table.add_row(name, "", "", *nothing, *sums, Text(told, style), style="bold", end_section=True)
    return table


def _stage_table(plan: MemoryPlan, shelves: Sequence[Shelf]) -> Table:
    table = _table()
    table.add_column("role")
    for stage in plan.stages:
        table.add_column(stage.name, justify="right")
    rows = _by_role(shelves)
    for role, _, tenant in rows:
        table.add_row(role, *map(_gib, tenant.used))
    sums = [sum(sizes) for sizes in zip(*(tenant.used for tenant in shelves[0].tenants), strict=True)]
    table.add_row("together", *map(_gib, sums), style="bold")
    return table


def _verdict(plan: MemoryPlan, changes: Sequence[Change]) -> Iterator[Text]:
    engine = plan.engine
    if engine is not None and engine.starts:
        room = engine.cached_tokens / max(1, engine.wanted_tokens)
        all_at_once = "all sequences at once" if room >= 1 else f"{room:.0%} of the sequences at once, others wait"
        yield Text(f"KV cache of an engine: {engine.cached_tokens:,} tokens, {all_at_once}")
    for problem in plan.problems:
        yield Text(problem, "bold red")
    if plan.fits:
        least = min(plan.shelves, key=lambda shelf: shelf.headroom / shelf.capacity)
        yield Text(f"It fits. Least is left on {_where([least])}: {_gib(least.headroom)} GiB.", "bold green")
        return
    for shelves in _alike(plan.shelves):
        if not shelves[0].fits:
            yield Text(f"{_where(shelves)}: {_gib(-shelves[0].headroom)} GiB too little", "bold red")
    if not changes:
        yield Text("No change of the config was found with which it fits here: take more or larger machines.", "bold")
        return
    yield Text("It fits with any of these, nearest first:", "bold")
    for change in changes:
        least = min(change.plan.shelves, key=lambda shelf: shelf.headroom / shelf.capacity)
        yield Text(f"  {' '.join(change.arguments)}   (leaves {_gib(least.headroom)} GiB)")


def _alike(shelves: Sequence[Shelf]) -> Iterator[list[Shelf]]:
    """Shelves one after the other on which the same roles take the same."""

    def content(shelf: Shelf) -> tuple[object, ...]:
        return (
            shelf.device is None,
            shelf.kind,
            shelf.capacity,
            sorted((t.role, t.held, t.used) for t in shelf.tenants),
        )

    devices = [shelf for shelf in shelves if shelf.device is not None]
    hosts = [shelf for shelf in shelves if shelf.kind == "host"]
    disks = [shelf for shelf in shelves if shelf.kind == "disk"]
    for kind in (devices, hosts, disks):
        for _, same in groupby(kind, key=content):
            yield list(same)


def _where(shelves: Sequence[Shelf]) -> str:
    first, last = shelves[0], shelves[-1]
    nodes = first.node if first.node == last.node else f"{first.node} to {last.node}"
    if first.device is None:
        return f"{nodes}, {'disk' if first.kind == 'disk' else 'host memory'}"
    numbers = sorted({shelf.device for shelf in shelves if shelf.device is not None})
    several = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
    return f"{nodes}, {first.kind} {several}"


def _is_shared(shelf: Shelf) -> bool:
    """Whether roles share a device, so that it matters who needs what when."""
    return shelf.device is not None and len({tenant.role for tenant in shelf.tenants}) > 1


def _by_role(shelves: Sequence[Shelf]) -> list[tuple[str, str, Tenant]]:
    """Roles of the first of some shelves that are alike, their ranks on all of them, and what one rank takes."""
    rows = []
    for role in dict.fromkeys(tenant.role for tenant in shelves[0].tenants):
        same = sorted((t for t in shelves[0].tenants if t.role == role), key=lambda tenant: tenant.held, reverse=True)
        ranks = sorted({tenant.rank for shelf in shelves for tenant in shelf.tenants if tenant.role == role})
        for _, alike in groupby(same, key=lambda tenant: tenant.held):
            one, *others = list(alike)
            each = f" (each of {len(others) + 1})" if others else ""
            rows.append((f"{role}{each}", _ranks(ranks), one))
    return rows


def _ranks(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _told(shelf: Shelf) -> tuple[str, str]:
    """In words, and the style of these."""
    if not shelf.tenants:
        return "unused", "dim"
    if not shelf.fits:
        return "does not fit", "bold red"
    return ("fits, tight", "yellow") if shelf.headroom < TIGHT * shelf.capacity else ("fits", "green")


def _columns(items: Iterable[Item]) -> list[int]:
    sizes = dict.fromkeys([*COLUMNS, "process"], 0)
    for item in items:
        column = next((name for name, parts in COLUMNS.items() if item.name in parts), "process")
        sizes[column] += item.size
    return list(sizes.values())


def _gib(size: int) -> str:
    if not size:
        return "-"
    return f"{size / GIB:.1f}" if abs(size) >= 10 * GIB else f"{size / GIB:.2f}"


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 1))


def _print_table(console: Console, title: str, table: Table) -> None:
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(table)
    console.print()
