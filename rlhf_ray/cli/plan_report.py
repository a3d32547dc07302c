"""A plan as tables, or as JSON."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_ray.cli.time_report import plain_table
from rlhf_ray.config.number_formats import NumberFormats
from rlhf_ray.planner.changes import Change
from rlhf_ray.planner.devices import GIB
from rlhf_ray.planner.footprint import MemoryItem
from rlhf_ray.planner.hardware import Hardware
from rlhf_ray.planner.memory import MemoryPlan, MemoryPool, MemoryUse
from rlhf_ray.telemetry.progress import QuietConsole

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
    _print_table(console, f"Memory on {hardware.name}, in GiB, when it is most", _memory_table(plan))
    for pools in _alike(plan.pools):
        if _is_shared(pools[0]):
            title = f"{_where(pools)}, stage by stage: what each role needs"
            _print_table(console, title, _stage_table(plan, pools))
    for line in _verdict(plan, changes):
        console.print(line, soft_wrap=True)


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
            "number_formats": formats.content(),
            "warnings": list(formats.warnings),
            "stages": [stage.name for stage in plan.stages],
            "memory": [_pool_json(pool) for pool in plan.pools],
            "object_store": {"needed": plan.store_needed, "capacity": plan.store},
            "engine": engine and {"cached_tokens": engine.cached_tokens, "wanted_tokens": engine.wanted_tokens},
            "changes": [change.arguments for change in changes],
            "time": time,
        },
        indent=2,
    )


def _pool_json(pool: MemoryPool) -> dict[str, object]:
    return {
        "node": pool.node,
        "device": pool.device,
        "kind": pool.kind,
        "capacity": pool.capacity,
        "held": pool.held,
        "headroom": pool.headroom,
        "fits": pool.fits,
        "roles": [
            {
                "role": use.role,
                "rank": use.rank,
                "held": max(use.held),
                "stages": list(use.used),
                "parts": dict(sorted(_summed(use.items, lambda item: item.name).items())),
            }
            for use in pool.uses
        ],
    }


def _summed(items: Iterable[MemoryItem], name_of: Callable[[MemoryItem], str]) -> Counter[str]:
    """Bytes of items by some name of each."""
    sizes = Counter[str]()
    for item in items:
        sizes[name_of(item)] += item.size
    return sizes


def _column(item: MemoryItem) -> str:
    return next((name for name, parts in COLUMNS.items() if item.name in parts), "process")


def _memory_table(plan: MemoryPlan) -> Table:
    columns = [*COLUMNS, "process"]
    table = plain_table(["where", "role", "ranks"], [*columns, "together", "of", "left"])
    table.add_column("")
    for pools in _alike(plan.pools):
        pool, where = pools[0], _where(pools)
        rows = _by_role(pools)
        for number, (role, ranks, use) in enumerate(rows):
            sizes = _summed(use.items, _column)
            parts = [_gib(sizes[column]) for column in columns]
            table.add_row(where if number == 0 else "", role, ranks, *parts, _gib(max(use.held)))
        told, style = _told(pool)
        sums = (_gib(pool.held), _gib(pool.capacity), _gib(pool.headroom))
        name = "" if rows else where
        table.add_row(name, "", "", *("" for _ in columns), *sums, Text(told, style), style="bold", end_section=True)
    return table


def _stage_table(plan: MemoryPlan, pools: Sequence[MemoryPool]) -> Table:
    table = plain_table(["role"], [stage.name for stage in plan.stages])
    for role, _, use in _by_role(pools):
        table.add_row(role, *map(_gib, use.used))
    sums = [sum(sizes) for sizes in zip(*(use.used for use in pools[0].uses), strict=True)]
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
        least = min(plan.pools, key=lambda pool: pool.headroom / pool.capacity)
        yield Text(f"It fits. Least is left on {_where([least])}: {_gib(least.headroom)} GiB.", "bold green")
        return
    for pools in _alike(plan.pools):
        if not pools[0].fits:
            yield Text(f"{_where(pools)}: {_gib(-pools[0].headroom)} GiB too little", "bold red")
    if not changes:
        yield Text("No change of the config was found with which it fits here: take more or larger machines.", "bold")
        return
    yield Text("It fits with any of these, nearest first:", "bold")
    for change in changes:
        least = min(change.plan.pools, key=lambda pool: pool.headroom / pool.capacity)
        yield Text(f"  {' '.join(change.arguments)}   (leaves {_gib(least.headroom)} GiB)")


def _alike(pools: Sequence[MemoryPool]) -> Iterator[list[MemoryPool]]:
    """Memory pools one after the other on which the same roles take the same."""

    def content(pool: MemoryPool) -> tuple[object, ...]:
        return (
            pool.device is None,
            pool.kind,
            pool.capacity,
            sorted((t.role, t.held, t.used) for t in pool.uses),
        )

    devices_first = sorted(pools, key=lambda pool: (pool.device is None, pool.kind == "disk"))
    for _, same in groupby(devices_first, key=content):
        yield list(same)


def _where(pools: Sequence[MemoryPool]) -> str:
    first, last = pools[0], pools[-1]
    nodes = first.node if first.node == last.node else f"{first.node} to {last.node}"
    if first.device is None:
        return f"{nodes}, {'disk' if first.kind == 'disk' else 'host memory'}"
    return f"{nodes}, {first.kind} {_numbers(pool.device for pool in pools if pool.device is not None)}"


def _is_shared(pool: MemoryPool) -> bool:
    """Whether roles share a device, so that it matters who needs what when."""
    return pool.device is not None and len({use.role for use in pool.uses}) > 1


def _by_role(pools: Sequence[MemoryPool]) -> list[tuple[str, str, MemoryUse]]:
    """Roles of the first of some memory pools that are alike, their ranks on all of them, and what one rank takes."""
    rows = []
    for role in dict.fromkeys(use.role for use in pools[0].uses):
        same = sorted((t for t in pools[0].uses if t.role == role), key=lambda use: use.held, reverse=True)
        ranks = _numbers(use.rank for pool in pools for use in pool.uses if use.role == role)
        for _, alike in groupby(same, key=lambda use: use.held):
            one, *others = list(alike)
            each = f" (each of {len(others) + 1})" if others else ""
            rows.append((f"{role}{each}", ranks, one))
    return rows


def _numbers(found: Iterable[int]) -> str:
    """The only one, or the first and the last."""
    numbers = sorted(set(found))
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _told(pool: MemoryPool) -> tuple[str, str]:
    """In words, and the style of these."""
    if not pool.uses:
        return "unused", "dim"
    if not pool.fits:
        return "does not fit", "bold red"
    return ("fits, tight", "yellow") if pool.headroom < TIGHT * pool.capacity else ("fits", "green")


def _gib(size: int) -> str:
    if not size:
        return "-"
    return f"{size / GIB:.1f}" if abs(size) >= 10 * GIB else f"{size / GIB:.2f}"


def _print_table(console: Console, title: str, table: Table) -> None:
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(table)
    console.print()
