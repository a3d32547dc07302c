"""The status of runs: a table, which is live on a terminal, a line for each change elsewhere, or JSON."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rlhf_ray.cli.run_snapshots import Snapshot
from rlhf_ray.telemetry.progress import QuietConsole
from rlhf_ray.telemetry.record import RunRecord
from rlhf_ray.telemetry.reporter import HEARTBEAT_S
from rlhf_ray.telemetry.status import ActorStatus, Progress, RunStatus

# Roles with more ranks show neighbours that do the same on one node as one row.
_RANKS_SHOWN = 8
_GIB = 2**30
_COLOURS = {"up": "green", "starting": "yellow", "silent": "yellow", "dead": "red"}
_RATES = {
    "throughput/response_tokens_per_s": "response tokens/s",
    "throughput/train_tokens_per_s": "train tokens/s",
}


class Screen:
    """Shows one look at runs after the other.

    Args:
        live: looks follow each other. On a terminal each takes the place of the one before, elsewhere a run has its
            table once and then a line for each change.
        as_json: a line for each run and look instead.
    """

    def __init__(self, *, live: bool, as_json: bool) -> None:
        self._console = QuietConsole()
        on_terminal = live and not as_json and self._console.is_terminal
        self._live = Live(console=self._console, auto_refresh=False) if on_terminal else None
        self._json = as_json
        self._shown: dict[str, tuple[str, ...]] = {}

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, found: Sequence[Snapshot]) -> None:
        """All runs of one look."""
        if self._json:
            for snapshot in found:
                line = json.dumps({"state": snapshot.state, **asdict(snapshot)}, ensure_ascii=False)
                self._console.out(line, highlight=False)
            return
        if self._live is not None:
            self._live.update(_views(found), refresh=True)
        elif not self._shown:
            self._print(_views(found))
            self._shown = {snapshot.run_dir: _change(snapshot) for snapshot in found}
        else:
            self._show_changes(found)

    def _print(self, shown: RenderableType) -> None:
        """Without the blanks that fill up a table's last column."""
        with self._console.capture() as captured:
            self._console.print(shown)
        lines = captured.get().splitlines()
        self._console.out(*(line.rstrip() for line in lines), sep="\n", highlight=False)

    def _show_changes(self, found: Sequence[Snapshot]) -> None:
        for snapshot in found:
            before, now = self._shown.get(snapshot.run_dir), _change(snapshot)
            if now != before:
                self._shown[snapshot.run_dir] = now
                self._console.print(" · ".join(filter(None, now)), soft_wrap=True, markup=False, highlight=False)


def _change(snapshot: Snapshot) -> tuple[str, ...]:
    """What is worth a line when it differs."""
    if isinstance(snapshot, RunRecord):
        end = snapshot.session.end
        error = end.error if end is not None else ""
        return snapshot.session.name, snapshot.state, f"step {snapshot.step}/{snapshot.session.steps}", error
    step, phase = (0, "starting") if snapshot.progress is None else (snapshot.progress.step, snapshot.progress.phase)
    return snapshot.about.name, f"step {step}/{snapshot.about.steps}", phase, snapshot.last_error


def _views(found: Sequence[Snapshot]) -> RenderableType:
    parts = [part for snapshot in found for part in (Text(), view(snapshot))]
    return Group(*parts[1:]) if parts else Text("no run goes on there")


def view(snapshot: Snapshot) -> RenderableType:
    """One run."""
    if isinstance(snapshot, RunRecord):
        return _facts(_record_facts(snapshot))
    return Group(_facts(_run_facts(snapshot)), Text(), actor_table(snapshot))


def _facts(rows: Iterator[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, fact in rows:
        table.add_row(name, Text(fact))
    return table


def _run_facts(run: RunStatus) -> Iterator[tuple[str, str]]:
    about, progress = run.about, run.progress
    yield "run", f"{about.name} ({about.job}) · {about.run_dir}"
    silent_s = run.now_s - run.heard_s
    silent = f" · silent for {duration(silent_s)}" if silent_s > 4 * HEARTBEAT_S else ""
    yield "driver", f"{about.node}, process {about.pid} · up for {duration(run.now_s - about.started_s)}{silent}"
    if progress is None:
        yield "step", f"0/{about.steps} · starting"
    else:
        doing = f" · {progress.phase} for {duration(run.now_s - progress.since_s)}" if progress.phase else ""
        yield "step", f"{progress.step}/{about.steps}{doing}"
        yield from _last_step(progress)
        if (shards := progress.shards) is not None:
            yield "shards", f"{shards.waiting} waiting · {shards.generating} generating · {shards.generated} generated"
    if run.metrics_urls:
        others = f" and {len(run.metrics_urls) - 1} more" if len(run.metrics_urls) > 1 else ""
        yield "metrics", f"{run.metrics_urls[0]}{others}"
    yield "last error", run.last_error or "none"


def _record_facts(record: RunRecord) -> Iterator[tuple[str, str]]:
    session, end = record.session, record.session.end
    yield "run", f"{session.name} ({session.job}) · {record.run_dir}"
    where = f"{session.host}, process {session.pid}"
    if end is not None:
        yield "state", f"{end.outcome} at {end.utc}"
    elif record.driver_alive:
        yield "state", f"its driver ({where}) is there, but nothing at {session.address} answers for it"
    else:
        yield "state", f"lost: its driver ({where}) has not said how it ended, and nothing answers for it"
    yield "started", session.started_utc
    kept = "no checkpoint" if record.checkpoint is None else f"newest checkpoint of step {record.checkpoint}"
    yield "step", f"{record.step}/{session.steps} · {kept}"
    yield from _last_step(Progress(record.step, "", 0.0, None, record.metrics))
    if end is not None and end.error:
        yield "last error", end.error


def _last_step(progress: Progress) -> Iterator[tuple[str, str]]:
    found = progress.metrics
    facts = [f"{found['time/step_s']:.1f} s"] if "time/step_s" in found else []
    facts += [f"{found[name]:,.0f} {unit}" for name, unit in _RATES.items() if name in found]
    if facts:
        yield "last step", " · ".join(facts)


def actor_table(run: RunStatus) -> Table:
    """A row for each actor, or for neighbours that do the same."""
    nodes = _node_names(run.actors)
    rows = [_row(actors, run.now_s, nodes) for actors in _together(run.actors)]
    names = ["actor", "node", "process", "state", "phase", "for", "memory", "device", "requests", "weights"]
    used = [name for name in names if any(row.get(name) for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in used:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(name, Text()) for name in used))
    return table


def _together(actors: Sequence[ActorStatus]) -> Iterator[list[ActorStatus]]:
    for _, group in groupby(actors, key=lambda actor: actor.role):
        ranks = list(group)
        if len(ranks) <= _RANKS_SHOWN:
            yield from ([actor] for actor in ranks)
        else:
            yield from (list(alike) for _, alike in groupby(ranks, key=_what_it_does))


def _what_it_does(actor: ActorStatus) -> tuple[str, str, str, str]:
    at = actor.activity
    return (actor.state, "", "", actor.error) if at is None else (actor.state, at.node_id, at.phase, actor.error)


def _node_names(actors: Sequence[ActorStatus]) -> dict[str, str]:
    """By Ray's id; nodes that share an address are told apart by the beginning of it."""
    addresses = {actor.activity.node_id: actor.activity.node for actor in actors if actor.activity is not None}
    shared = Counter(addresses.values())
    return {id_: f"{at} ({id_[:4]})" if shared[at] > 1 else at for id_, at in addresses.items()}


def _row(actors: Sequence[ActorStatus], now_s: float, nodes: Mapping[str, str]) -> dict[str, Text]:
    """What is known, by column."""
    first = actors[0]
    name = first.name if len(actors) == 1 else f"{first.name}–{actors[-1].rank}"
    state = Text(first.state, style=_COLOURS[first.state])
    if first.state == "silent" and first.heard_s is not None:
        state.append(f" for {duration(now_s - first.heard_s)}")
    cells = {"actor": Text(name), "state": state}
    said = [actor.activity for actor in actors if actor.activity is not None]
    if not said:
        return cells
    at = said[0]
    devices = [one.device_bytes for one in said if one.device_bytes is not None]
    running = [one.running for one in said if one.running is not None]
    waiting = [one.waiting for one in said if one.waiting is not None]
    versions = sorted({one.version for one in said if one.version is not None})
    words = {
        "node": nodes[at.node_id],
        "process": str(at.pid) if len(said) == 1 else "",
        "phase": at.phase or "idle",
        "for": duration(now_s - min(one.since_s for one in said)) if first.state != "dead" else "",
        "memory": _most([(one.host_bytes, _size(one.host_bytes)) for one in said]),
        "device": _most([(used, f"{_size(used)} of {_size(total)}") for used, total in devices]),
        "requests": f"{sum(running)} running, {sum(waiting)} waiting" if running else "",
        "weights": "–".join(f"{version}" for version in dict.fromkeys((*versions[:1], *versions[-1:]))),
    }
    return cells | {column: Text(word) for column, word in words.items()}


def _most(sizes: Sequence[tuple[int, str]]) -> str:
    """The largest, in words, said to be that when it stands for several."""
    if not sizes:
        return ""
    _, largest = max(sizes)
    return largest if len(sizes) == 1 else f"≤ {largest}"


def _size(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """`3.2 s`, `4 min 10 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{max(0.0, seconds):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
