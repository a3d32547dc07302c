"""Whether a job fits: the processes of all roles on their devices and nodes, stage by stage of a step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf_ray.cluster.sharing import DeviceSharing
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.roles import Level, needs_by_phase
from rlhf_ray.config.sharing import shared_places
from rlhf_ray.planner.calibration import ProcessMemory
from rlhf_ray.planner.footprint import (
    OFFLOAD_LOCATIONS,
    Footprint,
    Location,
    MemoryItem,
    PlannedPhase,
    StepPhase,
    always,
    during,
    total,
)
from rlhf_ray.planner.hardware import Hardware, Machine
from rlhf_ray.planner.jobs import workload_of
from rlhf_ray.planner.placement import RoleProcess, assign_processes
from rlhf_ray.planner.role_memory import EnginePlan, engine_plan, scored_items, trained_items
from rlhf_ray.planner.work import BYTES
from rlhf_ray.planner.workload import ModelRole, RolloutRole, ScoredRole, TrainedRole, Workload

HOST_SHARE = 0.95
"""Of host memory: where Ray's memory monitor begins to end processes (`RAY_memory_usage_threshold`)."""


@dataclass(frozen=True)
class Stage:
    """A part of a step.

    Attributes:
        name: for people.
        phase: of the step.
        working: roles that work in it, by the key of their placement.
        levels: of the roles that leave their devices to others; others are always there.
    """

    name: str
    phase: PlannedPhase
    working: frozenset[str]
    levels: Mapping[str, Level]


def stages(workload: Workload) -> list[Stage]:
    """The stages of a step, after the loading of all models, in a run that has settled."""
    places = workload.job.placements
    sharing = DeviceSharing(
        shared_places(places) if workload.job.placement.leaves_idle else [], needs_by_phase(workload.job.roles)
    )
    order = _order(workload, sharing)
    for _, phase, roles in order:  # one step before the one that is told of
        sharing.enter(phase, roles)
    # Roles that leave load one after the other, and go before the next comes; a device must hold any of them whole.
    found = [Stage("load", "load", frozenset(places), {})]
    for name, phase, roles in order:
        sharing.enter(phase, roles)
        found.append(Stage(name, phase, roles, dict(sharing.levels)))
    return found


def _order(workload: Workload, sharing: DeviceSharing) -> list[tuple[str, StepPhase, frozenset[str]]]:
    """Name, phase and working roles of each stage of a step."""
    needs = needs_by_phase(workload.job.roles)
    order: list[tuple[str, StepPhase, frozenset[str]]] = []
    for phase in workload.phases:
        if phase == "update":
            turns = sharing.turns(workload.updated)
            order += [(_name(turn, turns), phase, frozenset(turn)) for turn in turns]
        else:
            order.append((phase, phase, frozenset(needs[phase])))
    return order


def _name(turn: list[str], turns: list[list[str]]) -> str:
    return "update" if len(turns) == 1 else f"update {' and '.join(turn)}"


@dataclass(frozen=True)
class MemoryUse:
    """What one process, or something else, takes of a memory pool.

    Attributes:
        role: of the process; `ray` for Ray's own processes, `controller`, `object store`.
        rank: of the process.
        held: bytes in each stage, what it keeps without using it included.
        used: bytes that it needs in each stage.
        items: what it holds when that is most.
    """

    role: str
    rank: int
    held: tuple[int, ...]
    used: tuple[int, ...]
    items: tuple[MemoryItem, ...]


@dataclass(frozen=True)
class MemoryPool:
    """One device's memory, or the host memory or the local disk of one node.

    Attributes:
        node: its name.
        device: number of the device within the node, None for host memory and disk.
        kind: name of the device's kind, `host` or `disk`.
        capacity: bytes that processes can have.
        uses: who takes how much of it.
    """

    node: str
    device: int | None
    kind: str
    capacity: int
    uses: tuple[MemoryUse, ...]

    @property
    def held(self) -> int:
        """Bytes in the fullest stage."""
        return max((sum(stage) for stage in zip(*(use.held for use in self.uses), strict=True)), default=0)

    @property
    def headroom(self) -> int:
        """Bytes that are left; negative when it is too small."""
        return self.capacity - self.held

    @property
    def fits(self) -> bool:
        """Whether it is large enough."""
        return self.headroom >= 0


@dataclass(frozen=True)
class MemoryPlan:
    """Where a job's memory goes.

    Attributes:
        stages: of a step.
        pools: devices of each node, then its host memory.
        engine: one rollout engine; None in a job without.
        store_needed, store: bytes of a step in Ray's object store, and of the smallest one.
    """

    workload: Workload
    stages: tuple[Stage, ...]
    pools: tuple[MemoryPool, ...]
    engine: EnginePlan | None
    store_needed: int
    store: int

    @property
    def fits(self) -> bool:
        """Whether the job can run."""
        return all(pool.fits for pool in self.pools) and not self.problems

    @property
    def problems(self) -> list[str]:
        """What else stands in the way, in words."""
        found = []
        rollout = self.workload.rollout
        if rollout is not None and self.engine is not None and not self.engine.starts:
            found.append(
                f"{rollout.name}: the KV cache of an engine has no room for one sequence of "
                f"{rollout.section}.engine.max_model_len ({rollout.engine.max_model_len}) tokens, so vLLM won't start"
            )
        if self.store_needed > self.store:
            found.append(
                f"object store: a step's trajectories take {self.store_needed / 2**30:.1f} GiB, but a node's store has "
                f"{self.store / 2**30:.1f} GiB: Ray would write the rest to disk. Lower data.prompts_per_step, or "
                "start Ray with a larger --object-store-memory"
            )
        return found


def plan_memory(job: Job, hardware: Hardware, processes: ProcessMemory) -> MemoryPlan:
    """Where the memory of a job goes.

    Raises:
        ShapeError: when the shape of a model can't be read.
        PlacementError: when a role can not be placed, whatever its memory.
    """
    workload = workload_of(job)
    assigned = assign_processes(workload, hardware)
    building = _Building(workload, hardware, processes, stages(workload))
    for process in assigned:
        building.add(process)
    building.add_others()
    return building.plan()


class _Building:
    def __init__(self, workload: Workload, hardware: Hardware, processes: ProcessMemory, step: Sequence[Stage]) -> None:
        self._workload, self._hardware, self._processes, self._stages = workload, hardware, processes, step
        self._uses: dict[tuple[str, int | Location], list[MemoryUse]] = {}
        self._machines: dict[str, Machine] = {machine.node.name: machine for machine in hardware.machines}
        self._alike: dict[tuple[str, int, bool, bool], dict[Location, MemoryUse]] = {}
        self._engine: EnginePlan | None = None

    def add(self, process: RoleProcess) -> None:
        """A process on its device and node."""
        like = (process.role.name, process.machine.device_memory, process.device is None, process.first)
        if like not in self._alike:
            self._alike[like] = self._use_of(process)
        for location, use in self._alike[like].items():
            pool: int | Location = process.device if location == "device" and process.device is not None else location
            self._uses.setdefault((process.machine.node.name, pool), []).append(replace(use, rank=process.rank))

    def add_others(self) -> None:
        """What is there beside the roles: on each node Ray and its store, on the first the controller."""
        first, *_ = self._machines
        store = self._workload.trajectory_bytes
        for node in self._machines:
            self._keep(node, "ray", self._processes.bytes_of("node_mib"))
            self._keep(node, "object store", store)
        self._keep(first, "controller", self._processes.bytes_of("controller_mib"))
        for number in range(self._workload.text_workers):
            name = list(self._machines)[number % len(self._machines)]
            self._keep(name, "reward workers", self._processes.bytes_of("worker_mib"))

    def plan(self) -> MemoryPlan:
        """All of it."""
        return MemoryPlan(
            workload=self._workload,
            stages=tuple(self._stages),
            pools=tuple(self._pools()),
            engine=self._engine,
            store_needed=self._workload.trajectory_bytes,
            store=min(machine.object_store for machine in self._hardware.machines),
        )

    def _pools(self) -> Iterator[MemoryPool]:
        for node, machine in self._machines.items():
            for device in range(machine.devices):
                uses = tuple(self._uses.get((node, device), ()))
                yield MemoryPool(node, device, machine.kind_name, machine.device_memory, uses)
            host = tuple(self._uses.get((node, "host"), ()))
            yield MemoryPool(node, None, "host", int(machine.host_memory * HOST_SHARE), host)
            disk = tuple(self._uses.get((node, "disk"), ()))
            if disk and machine.disk_space is not None:
                yield MemoryPool(node, None, "disk", machine.disk_space, disk)

    def _use_of(self, process: RoleProcess) -> dict[Location, MemoryUse]:
        """What one process takes of its device and of its node's host memory."""
        role, footprint = process.role, self._footprint(process, cpu=process.device is None)
        found: dict[Location, MemoryUse] = {}
        for location in OFFLOAD_LOCATIONS.values():
            if not any(item.location == location for item in footprint.items):
                continue
            used = tuple(total(self._in_stage(role, footprint, location, stage)) for stage in self._stages)
            # Allocators keep what they once had, unless the process leaves its device.
            leaves = location == "device" and role.placed_as in self._stages[-1].levels
            peak = tuple(footprint.peak(location))
            found[location] = MemoryUse(role.name, 0, used if leaves else (total(peak),) * len(used), used, peak)
        return found

    def _footprint(self, process: RoleProcess, *, cpu: bool) -> Footprint:
        role = process.role
        items = [*self._model_items(role, process.machine, cpu=cpu), *self._process_items(role, process, cpu=cpu)]
        if not cpu:
            items += self._copies(role, items)
            return Footprint.of(items)
        # The device of a process on the CPU is host memory, which nothing leaves.
        return Footprint.of(
            replace(item, location="host" if item.location == "device" else item.location, level=Level.OUT)
            for item in items
        )

    def _model_items(self, role: ModelRole, machine: Machine, *, cpu: bool) -> list[MemoryItem]:
        if isinstance(role, TrainedRole):
            return trained_items(role, cpu=cpu)
        if isinstance(role, ScoredRole):
            return scored_items(role, cpu=cpu)
        self._engine = engine_plan(role, machine.device_memory, cpu=cpu)
        return list(self._engine.items)

    def _process_items(self, role: ModelRole, process: RoleProcess, *, cpu: bool) -> Iterator[MemoryItem]:
        """The process itself."""
        amount = self._processes.bytes_of
        if isinstance(role, RolloutRole):
            yield always("process", amount("engine_mib" if process.first else "worker_mib"), Level.OUT, "host")
        else:
            yield always("process", amount("rank_mib"), Level.OUT, "host")
        if isinstance(role, TrainedRole) and cpu:
            yield always("process", amount("trainer_mib"), Level.OUT, "host")
        if isinstance(role, TrainedRole) and role.sync_bytes:
            yield always("process", amount("sender_mib"), Level.OUT, "host")
        if cpu:
            return
        yield always("process", amount("on_gpu_mib"), Level.OUT, "host")
        yield always("CUDA", amount("context_mib"), Level.OUT)
        if isinstance(role, RolloutRole) and not role.engine.enforce_eager:
            yield always("CUDA graphs", amount("graphs_mib"), Level.OUT)
        if not isinstance(role, RolloutRole):  # engines read theirs to the device
            size = BYTES[role.engine.dtype] * role.shape.parameters
            size //= role.ranks if role.engine.zero_stage == 3 else 1
            yield during("weights on their way to the device", size, "load", location="host")

    def _copies(self, role: ModelRole, items: Sequence[MemoryItem]) -> Iterator[MemoryItem]:
        """What roles that leave their device keep in host memory, in buffers that stay."""
        if role.placed_as not in self._stages[-1].levels or not role.keeps_weights:
            return
        most = Level.WEIGHTS if isinstance(role, RolloutRole) else Level.FULL  # engines forget their KV cache
        for item in items:
            if item.location == "device" and item.moments is None and Level.OUT < item.level <= most:
                yield always(item.name, item.size, Level.OUT, "host")

    def _in_stage(self, role: ModelRole, footprint: Footprint, location: Location, stage: Stage) -> list[MemoryItem]:
        level = stage.levels.get(role.placed_as, Level.FULL)
        if role.placed_as not in stage.working:
            return footprint.idle(location, level)
        return [item for item in footprint.peak(location, stage.phase) if item.moments or item.level <= level]

    def _keep(self, node: str, role: str, size: int) -> None:
        sizes = (size,) * len(self._stages)
        item = always(role, size, Level.OUT, "host")
        self._uses.setdefault((node, "host"), []).append(MemoryUse(role, 0, sizes, sizes, (item,)))
