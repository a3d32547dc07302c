"""From `dtype: auto` to number formats: which engines of a job ask for one, and the job with what was chosen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Protocol

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import apply_override
from rlhf_ray.config.training import Computing, Dtype


class Products(Protocol):
    """How a CPU multiplies matrices of bfloat16 numbers; `platform.CpuProducts` says what each means."""

    @property
    def in_bfloat16(self) -> bool: ...
    @property
    def why(self) -> str: ...
    @property
    def times_as_long(self) -> str: ...


Look = Callable[[str], Mapping[str, Products]]
"""For a role that computes on CPUs: the products of each machine that it may come to, by the machine's name."""


@dataclass(frozen=True)
class Chosen:
    """The number format that `auto` became.

    Attributes:
        key: dotted path of the engine's section.
        why: a clause that goes after the format and a colon.
    """

    key: str
    dtype: Dtype
    why: str


@dataclass(frozen=True)
class NumberFormats:
    """A job without `auto`, as far as its machines are known.

    Attributes:
        config: of the job.
        chosen: what was chosen, by engine.
        open: keys of engines whose machines are not known, and which are still `auto`.
        warnings: what was written out and is slow.
    """

    config: Job
    chosen: tuple[Chosen, ...]
    open: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """What was chosen and why, engines with the same answer together."""
        answer = attrgetter("dtype", "why")
        same = groupby(sorted(self.chosen, key=answer), key=answer)
        return [f"{dtype} for {', '.join(one.key for one in found)}: {why}" for (dtype, why), found in same]

    def content(self) -> dict[str, dict[str, str]]:
        """For JSON."""
        return {f"{one.key}.dtype": {"dtype": one.dtype, "why": one.why} for one in self.chosen}


def choose(
    config: Job,
    look: Look | None,
    *,
    kept: Mapping[str, Dtype] | None = None,
    source: str = "",
    all_on_gpus: bool = False,
) -> NumberFormats:
    """Put number formats in place of every `auto` of the roles that have actors.

    A role on GPUs gets bfloat16. All roles on CPUs get the same: bfloat16 where every machine that any of them may come
    to multiplies in it, else float32. Rollout engines get the policy's.

    Args:
        look: None where the machines are not known yet.
        kept: what an earlier session of the run computed in, by key of the engine; it stands, and the engines still get
            the policy's.
        source: where that is written.
        all_on_gpus: as if every role had GPUs, for a search that will give it some.
    """
    kept = kept or {}
    engines, roles = engines_of(config), {f"{role.section}.engine": role for role in config.roles}
    # The model that the job trains, and the engines that hold it too.
    [trained] = [key for key, role in roles.items() if role.exported]
    following = {key for key, role in roles.items() if role.kind == "engine"}
    gpus = {key for key in engines if all_on_gpus or on_gpus(config, roles[key].placed_as)}
    # Machines by their names, of each engine that computes on CPUs.
    seen = {key: look(roles[key].placed_as) for key in engines if look is not None and key not in gpus}
    auto = [key for key, engine in engines.items() if engine.dtype_choice == "auto"]
    own = [key for key in auto if key not in following]
    counted = {key for key in own if key not in kept}
    if trained in counted:
        counted |= following & set(auto)
    of_cpus = _of_cpus([entry for key, machines in seen.items() if key in counted for entry in machines.items()])
    found: dict[str, Chosen] = {}
    for key in own:
        if key in kept:
            found[key] = Chosen(key, kept[key], f"as in {source}, from which the run goes on")
        elif key in gpus:
            found[key] = Chosen(key, "bfloat16", "on GPUs")
        elif look is not None:
            found[key] = Chosen(key, *of_cpus)
    for key in (key for key in auto if key in following):
        written = engines[trained].dtype_choice
        if written != "auto":
            found[key] = Chosen(key, written, f"as {trained}")
        elif trained in found:
            found[key] = replace(found[trained], key=key)
    resolved = _with(config, {key: one.dtype for key, one in found.items()})
    warnings = [
        _slow(key, *slow)
        for key, engine in engines_of(resolved).items()
        if engine.dtype_choice == "bfloat16"
        if (slow := next((entry for entry in seen.get(key, {}).items() if not entry[1].in_bfloat16), None))
    ]
    return NumberFormats(resolved, tuple(found.values()), tuple(k for k in auto if k not in found), tuple(warnings))


def engines_of(config: Job) -> dict[str, Computing]:
    """The engines of all roles that hold models, by the dotted path of their section."""
    return {f"{role.section}.engine": role.engine for role in config.roles if role.engine is not None}


def on_gpus(config: Job, role: str) -> bool:
    """Whether a role computes on GPUs: those of its own bundles, or of the role that it sits with."""
    return config.placements[config.placements[role].colocate or role].gpus > 0


def _of_cpus(entries: Sequence[tuple[str, Products]]) -> tuple[Dtype, str]:
    """One format for all roles on CPUs. A machine can stand there several times, as a role's own environment variables
    can hold back its CPU for this role alone; the slower answer counts."""
    machines = dict(sorted(entries, key=lambda entry: not entry[1].in_bfloat16))
    slow = {name: one for name, one in machines.items() if not one.in_bfloat16}
    if not machines:
        return "float32", "no node that is there now can take a role on CPUs"
    name, one = next(iter((slow or machines).items()))
    count = f"{len(slow)} of {len(machines)}" if slow else f"all {len(machines)}"
    several = "" if len(machines) == 1 else f" ({count} nodes {'do not multiply' if slow else 'multiply'} in bfloat16)"
    return "float32" if slow else "bfloat16", f"the CPU of {name} {one.why}{several}"


def _slow(key: str, name: str, products: Products) -> str:
    return (
        f"{key}.dtype is bfloat16, but the CPU of {name} {products.why}: matrix products take "
        f"{products.times_as_long} as in float32 there; set it to float32"
    )


def _with(config: Job, dtypes: Mapping[str, Dtype]) -> Job:
    raw = config.model_dump(mode="json", by_alias=True)
    for key, dtype in dtypes.items():
        apply_override(raw, f"{key}.dtype={dtype}")
    return type(config).model_validate(raw)
