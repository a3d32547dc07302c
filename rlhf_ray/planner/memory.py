"""Whether a job fits: the processes of all roles on their devices and nodes, stage by stage of a step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf_ray.cluster.sharing import NEEDS, DeviceSharing
from rlhf_ray.config.jobs import JobConfig
from rlhf_ray.config.sharing import shared_places
from rlhf_ray.engines.level import Level
from rlhf_ray.planner.calibration import ProcessMemory
from rlhf_ray.planner.footprint import PLACES, Footprint, Item, Place, PlannedPhase, StepPhase, always, during, total
from rlhf_ray.planner.hardware import Hardware, Machine
from rlhf_ray.planner.jobs import offload_idle, workload_of
from rlhf_ray.planner.placement import Chair, seat_processes
from rlhf_ray.planner.role_memory import EnginePlan, engine_plan, scored_items, trained_items
from rlhf_ray.planner.workload import Role, RolloutRole, ScoredRole, TrainedRole, Workload

HOST_SHARE = 0.95
"""Of host memory: where Ray's memory monitor begins to end processes (`RAY_memory_usage_threshold`)."""


@dataclass(frozen=True)
class Stage:
    """A part of a step.

    Attributes:
        name: for people.
        phase: of the step.
        working: seats of the roles that work in it.
        levels: of the roles that leave their devices to others; others are always there.
    """

    name: str
    phase: PlannedPhase
    working: frozenset[str]
    levels: Mapping[str, Level]


def stages(workload: Workload) -> list[Stage]:
    """The stages of a step, after the loading of all models, in a run that has settled."""
    places = workload.job.places
    sharing = DeviceSharing(shared_places(places) if offload_idle(workload.job) else [])
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
    there = frozenset(workload.job.places)
    order: list[tuple[str, StepPhase, frozenset[str]]] = []
    for phase in workload.phases:
        if phase == "update":
            turns = sharing.turns(workload.updated)
            order += [(_name(turn, turns), phase, frozenset(turn)) for turn in turns]
        else:
            order.append((phase, phase, there & NEEDS[phase].keys()))
    return order


def _name(turn: list[str], turns: list[list[str]]) -> str:
    return "update" if len(turns) == 1 else f"update {' and '.join(turn)}"


@dataclass(frozen=True)
class Tenant:
    """One process, or something else, that takes memory of a shelf.

    Attributes:
        role: of the process; `ray` for Ray's own processes, `controller`, `object store`.
        rank: of the process.
        held: bytes in each stage, what it keeps without using it included.
        used: bytes that it needs in each stage.
        parts: what it holds when that is most.
    """

    role: str
    rank: int
    held: tuple[int, ...]
    used: tuple[int, ...]
    parts: tuple[Item, ...]


@dataclass(frozen=True)
class Shelf:
    """One device's memory, or the host memory or the local disk of one node.

    Attributes:
        node: its name.
        device: number of the device within the node, None for host memory and disk.
        kind: name of the device's kind, `host` or `disk`.
        capacity: bytes that processes can have.
        tenants: who takes of it.
    """

    node: str
    device: int | None
    kind: str
    capacity: int
    tenants: tuple[Tenant, ...]

    @property
    def held(self) -> int:
        """Bytes in the fullest stage."""
        return max((sum(stage) for stage in zip(*(tenant.held for tenant in self.tenants), strict=True)), default=0)

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
        shelves: devices of each node, then its host memory.
        engine: one rollout engine; None in a job without.
        store_needed, store: bytes of a step in Ray's object store, and of the smallest one.
    """

    workload: Workload
    stages: tuple[Stage, ...]
    shelves: tuple[Shelf, ...]
    engine: EnginePlan | None
    store_needed: int
    store: int

    @property
    def fits(self) -> bool:
        """Whether the job can run."""
        return all(shelf.fits for shelf in self.shelves) and not self.problems

    @property
    def problems(self) -> list[str]:
        """What else stands in the way, in words."""
        found = []
        rollout = self.workload.rollout
        if rollout is not None and self.engine is not None and not self.engine.starts:
            found.append(
                f"rollout: the KV cache of an engine has no room for one sequence of rollout.engine.max_model_len "
                f"({rollout.engine.max_model_len}) tokens, so vLLM won't start"
            )
        if self.store_needed > self.store:
            found.append(
                f"object store: a step's trajectories take {self.store_needed / 2**30:.1f} GiB, but a node's store has "
                f"{self.store / 2**30:.1f} GiB: Ray would write the rest to disk. Lower data.prompts_per_step, or "
                "start Ray with a larger --object-store-memory"
            )
        return found


def plan_memory(job: JobConfig, hardware: Hardware, processes: ProcessMemory) -> MemoryPlan:
    """Where the memory of a job goes.

    Raises:
        ShapeError: when the shape of a model can't be read.
        PlacementError: when a role has no place, whatever its memory.
    """
    workload = workload_of(job)
    chairs = seat_processes(workload, hardware)
    building = _Building(workload, hardware, processes, stages(workload))
    for chair in chairs:
        building.add(chair)
    building.add_others()
    return building.plan()


class _Building:
    def __init__(
        self, workload: Workload, hardware: Hardware, processes: ProcessMemory, parts: Sequence[Stage]
    ) -> None:
        self._workload, self._hardware, self._processes, self._stages = workload, hardware, processes, parts
        self._tenants: dict[tuple[str, int | Place], list[Tenant]] = {}
        self._machines: dict[str, Machine] = {machine.node.name: machine for machine in hardware.machines}
        self._alike: dict[tuple[str, int, bool, bool], dict[Place, Tenant]] = {}
        self._engine: EnginePlan | None = None

    def add(self, chair: Chair) -> None:
        """A process on its device and node."""
        like = (chair.role.name, chair.machine.device_memory, chair.device is None, chair.first)
        if like not in self._alike:
            self._alike[like] = self._tenant_of(chair)
        for place, tenant in self._alike[like].items():
            shelf: int | Place = chair.device if place == "device" and chair.device is not None else place
            self._tenants.setdefault((chair.machine.node.name, shelf), []).append(replace(tenant, rank=chair.rank))

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
            shelves=tuple(self._shelves()),
            engine=self._engine,
            store_needed=self._workload.trajectory_bytes,
            store=min(machine.object_store for machine in self._hardware.machines),
        )

    def _shelves(self) -> Iterator[Shelf]:
        for node, machine in self._machines.items():
            for device in range(machine.devices):
                tenants = tuple(self._tenants.get((node, device), ()))
                yield Shelf(node, device, machine.kind_name, machine.device_memory, tenants)
            host = tuple(self._tenants.get((node, "host"), ()))
            yield Shelf(node, None, "host", int(machine.host_memory * HOST_SHARE), host)
            disk = tuple(self._tenants.get((node, "disk"), ()))
            if disk and machine.disk_space is not None:
                yield Shelf(node, None, "disk", machine.disk_space, disk)

    def _tenant_of(self, chair: Chair) -> dict[Place, Tenant]:
        """What one process takes of its device and of its node's host memory."""
        role, footprint = chair.role, self._footprint(chair, cpu=chair.device is None)
        found: dict[Place, Tenant] = {}
        for place in PLACES.values():
            if not any(item.place == place for item in footprint.items):
                continue
            used = tuple(total(self._in_stage(role, footprint, place, stage)) for stage in self._stages)
            # Allocators keep what they once had, unless the process leaves its device.
            leaves = place == "device" and role.seat in self._stages[-1].levels
            peak = tuple(footprint.peak(place))
            found[place] = Tenant(role.name, 0, used if leaves else (total(peak),) * len(used), used, peak)
        return found

    def _footprint(self, chair: Chair, *, cpu: bool) -> Footprint:
        role = chair.role
        items = [*self._model_items(role, chair.machine, cpu=cpu), *self._process_items(role, chair, cpu=cpu)]
        if not cpu:
            items += self._copies(role, items)
            return Footprint.of(items)
        # The device of a process on the CPU is host memory, which nothing leaves.
        return Footprint.of(
            Item(item.name, item.size, "host" if item.place == "device" else item.place, item.moments, Level.OUT)
            for item in items
        )

    def _model_items(self, role: Role, machine: Machine, *, cpu: bool) -> list[Item]:
        if isinstance(role, TrainedRole):
            return trained_items(role, cpu=cpu)
        if isinstance(role, ScoredRole):
            return scored_items(role, cpu=cpu)
        self._engine = engine_plan(role, machine.device_memory, cpu=cpu)
        return list(self._engine.items)

    def _process_items(self, role: Role, chair: Chair, *, cpu: bool) -> Iterator[Item]:
        """The process itself."""
        amount = self._processes.bytes_of
        if isinstance(role, RolloutRole):
            yield always("process", amount("engine_mib" if chair.first else "worker_mib"), Level.OUT, "host")
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
        yield during("weights on their way to the device", self._loading(role), "load", place="host")

    def _loading(self, role: Role) -> int:
        """A model is read into host memory before it goes to a device."""
        return 0 if isinstance(role, RolloutRole) else role.loaded_bytes

    def _copies(self, role: Role, items: Sequence[Item]) -> Iterator[Item]:
        """What roles that leave their device keep in host memory, in buffers that stay; engines drop their weights."""
        if role.seat not in self._stages[-1].levels or isinstance(role, RolloutRole):
            return
        for item in items:
            if item.place == "device" and item.moments is None and item.level > Level.OUT:
                yield always(item.name, item.size, Level.OUT, "host")

    def _in_stage(self, role: Role, footprint: Footprint, place: Place, stage: Stage) -> list[Item]:
        level = stage.levels.get(role.seat, Level.FULL)
        if role.seat not in stage.working:
            return footprint.idle(place, level)
        return [item for item in footprint.peak(place, stage.phase) if item.moments or item.level <= level]

    def _keep(self, node: str, role: str, size: int) -> None:
        sizes = (size,) * len(self._stages)
        item = always(role, size, Level.OUT, "host")
        self._tenants.setdefault((node, "host"), []).append(Tenant(role, 0, sizes, sizes, (item,)))
