"""The machines that a plan is for: from a cluster file, from Ray, or this one."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf_ray.cluster.topology import Node
from rlhf_ray.config.base import NonNegativeFloat, PositiveFloat, ProcessCount, Section, nearest, suggestion
from rlhf_ray.config.loading import load_section
from rlhf_ray.config.placement import Cluster
from rlhf_ray.planner.devices import DEVICES, GB, GIB, RAY_NAMES, DeviceKind

OBJECT_STORE_SHARE = 0.3
"""Of host memory: what Ray gives to its object store unless told otherwise."""
MOST_NODES = 10_000
"""Of a plan, which looks at each."""
OBJECT_STORE_MOST = 200 * GB
"""Ray's own limit of that default."""


class PlanError(Exception):
    """A plan can't be made of what was given.

    Attributes:
        subject: the model, cluster or key that is the reason.
        reason: what is wrong with it, and the cure.
    """

    def __init__(self, subject: str, reason: str) -> None:
        self.subject, self.reason = subject, reason
        super().__init__(f"{subject}: {reason}")

    def __reduce__(self) -> tuple[type["PlanError"], tuple[str, str]]:
        return type(self), (self.subject, self.reason)


class NodeGroup(Section):
    """Nodes that are alike."""

    count: ProcessCount = 1
    """How many."""
    device: str = "CPU"
    """Kind of their devices: CPU for none, a built-in kind, or one of `devices`."""
    devices: Annotated[int, Field(ge=0, le=1000)] = 0
    """Devices of one node."""
    device_memory_gib: PositiveFloat | None = None
    """Memory of one device; by default what the kind has."""
    cpus: ProcessCount
    """CPUs that Ray counts on one node."""
    host_memory_gib: PositiveFloat
    """Host memory of one node."""
    object_store_gib: PositiveFloat | None = None
    """Memory of Ray's object store on one node, out of host memory; by default Ray's own 30 %, at most 200 GB."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels of each."""
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Custom Ray resources of each."""
    link_gb_s: PositiveFloat | None = None
    """Bandwidth between two devices of a node, in one direction; by default what the kind has."""
    network_gb_s: PositiveFloat = 12.5
    """Bandwidth from one node to the others, in 10⁹ bytes a second and one direction: 100 Gbit/s are 12.5."""
    disk_gb_s: PositiveFloat = 2.0
    """Bandwidth of the local disk, for what is offloaded to it."""
    disk_gib: NonNegativeFloat = 0.0
    """Free space of the local disk, for what is offloaded to it."""

    @model_validator(mode="after")
    def _devices_have_a_kind(self) -> "NodeGroup":
        if self.devices and self.device == "CPU":
            raise ValueError(f".devices is {self.devices}, but .device is not set: name their kind, such as H100")
        if not self.devices and self.device != "CPU":
            raise ValueError(f".device is {self.device!r}, but .devices is 0: say how many a node has")
        return self


class ClusterFile(Section):
    """A description of a cluster."""

    name: str = ""
    """What it is called in a plan; by default the name of the file."""
    devices: dict[str, DeviceKind] = Field(default_factory=dict)
    """Kinds of devices that are not built in."""
    nodes: tuple[NodeGroup, ...]
    """Groups of nodes."""

    @model_validator(mode="after")
    def _kinds_are_known(self) -> "ClusterFile":
        if not self.nodes:
            raise ValueError("nodes is empty: a cluster has at least one")
        known = {**DEVICES, **self.devices}
        for number, group in enumerate(self.nodes):
            if group.device not in known:
                hint = suggestion(group.device, known)
                raise ValueError(f"nodes.{number}.device: {group.device!r} is not known; {hint}")
        return self


@dataclass(frozen=True)
class Machine:
    """One node with what the planner knows of it.

    Attributes:
        node: as placement sees it.
        kind_name, kind: of its devices; the CPU where it has none.
        devices: how many; 0 where roles compute on the CPU.
        device_memory: bytes of one device; of a node without devices its host memory.
        host_memory: bytes.
        object_store: bytes of host memory that are Ray's object store.
        link, network, disk: bytes a second between devices, to other nodes, and of the local disk.
        disk_space: bytes; None when it is not known.
    """

    node: Node
    kind_name: str
    kind: DeviceKind
    devices: int
    device_memory: int
    host_memory: int
    object_store: int
    link: float
    network: float
    disk: float
    disk_space: int | None

    @property
    def cpus(self) -> float:
        """CPUs that Ray counts."""
        return self.node.resources.get("CPU", 0.0)


@dataclass(frozen=True)
class Hardware:
    """All machines.

    Attributes:
        name: of the cluster.
        machines: in the order that Ray or the file has them.
    """

    name: str
    machines: tuple[Machine, ...]

    @property
    def device(self) -> Literal["cpu", "gpu"]:
        """What roles compute on there, unless told otherwise."""
        return "gpu" if any(machine.devices for machine in self.machines) else "cpu"

    @property
    def nodes(self) -> list[Node]:
        """As placement sees them."""
        return [machine.node for machine in self.machines]

    def machine(self, node: Node) -> Machine:
        """That is this node."""
        return next(machine for machine in self.machines if machine.node.node_id == node.node_id)


def ready_clusters() -> list[str]:
    """Names of the cluster files that come along."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _ready().iterdir() if entry.name.endswith(".yaml"))


def load_hardware(cluster: str, times: int = 1) -> Hardware:
    """From a cluster file, or from the name of one that comes along.

    Args:
        times: how often the cluster has each of its nodes.

    Raises:
        ConfigError: with every problem of the file.
        PlanError: when there is no such file.
    """
    path = Path(cluster)
    if not os.path.exists(cluster) or os.path.isdir(cluster):
        name = cluster.lower().replace("×", "x")
        known = ready_clusters()
        if name not in known:
            close = nearest(name, known)
            raise PlanError(
                f"--cluster {cluster}",
                "there is no such file or name"
                + (f"; did you mean {close!r}?" if close else f". Names: {', '.join(known)}, live"),
            )
        path = Path(str(_ready() / f"{name}.yaml"))
    return _of_file(load_section(path, ClusterFile), path.stem, times)


def _ready() -> Any:
    return files("rlhf_ray.planner") / "clusters"


def _of_file(file: ClusterFile, stem: str, times: int) -> Hardware:
    machines: list[Machine] = []
    count = times * sum(group.count for group in file.nodes)
    if count > MOST_NODES:
        raise PlanError(f"--cluster {stem}", f"{count:,} nodes are more than the {MOST_NODES:,} that are planned for")
    for group in file.nodes:
        kind = {**DEVICES, **file.devices}[group.device]
        for _ in range(group.count * times):
            name = f"node-{len(machines)}"
            resources = {"CPU": float(group.cpus), **group.resources}
            if group.devices:
                resources |= {"GPU": float(group.devices), f"accelerator_type:{group.device}": 1.0}
            host = int(group.host_memory_gib * GIB)
            store = min(int(host * OBJECT_STORE_SHARE), OBJECT_STORE_MOST)
            store = int(group.object_store_gib * GIB) if group.object_store_gib else store
            node = Node(name, resources, dict(resources), dict(group.labels), name)
            machines.append(_machine(node, group, kind, host, store, int(group.disk_gib * GIB)))
    name = file.name or stem
    return Hardware(f"{times} × {name}" if times > 1 else name, tuple(machines))


def of_ray(nodes: Sequence[Mapping[str, Any]], free: Mapping[str, Mapping[str, float]], name: str) -> Hardware:
    """From what Ray reports.

    Args:
        nodes: `ray.nodes()`.
        free: by node id, what is not taken.
        name: of the cluster.

    Raises:
        PlanError: when a node's devices are of a kind that is not known.
    """
    machines = []
    for row in nodes:
        if not row["Alive"]:
            continue
        resources = dict(row["Resources"])
        address, devices = row["NodeManagerAddress"], int(resources.get("GPU", 0))
        kind = _kind_of(resources, row.get("Labels") or {}, f"node {address}") if devices else "CPU"
        store = int(resources.get("object_store_memory", 0))
        host = int(resources.get("memory", 0)) + store
        node = Node(address, resources, dict(free.get(row["NodeID"], {})), dict(row.get("Labels") or {}), row["NodeID"])
        machines.append(_found(node, kind, devices, host, store))
    if not machines:
        raise PlanError(f"cluster {name}", "Ray reports no node that is alive")
    return Hardware(name, tuple(machines))


def this_machine(cpus: int | None) -> Hardware:
    """This machine, as a local Ray cluster would offer it.

    Args:
        cpus: `cluster.cpus` of the job.
    """
    from rlhf_ray.platform import device_names

    names = device_names()
    resources = {"CPU": float(os.cpu_count() or 1 if cpus is None else cpus)}
    kind = "CPU"
    if names:
        resources["GPU"] = float(len(names))
        kind = _known_kind(names[0].removeprefix("NVIDIA ").split()[0], "this machine")
    host = _memory_here()
    node = Node("this machine", resources, dict(resources), {}, "local")
    return Hardware("this machine", (_found(node, kind, len(names), host, int(host * OBJECT_STORE_SHARE)),))


def _memory_here() -> int:
    """Of this machine, or what its container may use."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(physical, int(text)) if text.isdigit() else physical


def _found(node: Node, kind: str, devices: int, host: int, store: int) -> Machine:
    """A machine that is there, with the bandwidths that a cluster file has by default."""
    cpus = int(node.resources.get("CPU", 0))  # unchecked, as there may be none
    group = NodeGroup.model_construct(device=kind, devices=devices, cpus=cpus, host_memory_gib=host / GIB)
    return _machine(node, group, DEVICES[kind], host, store, None)


def _machine(node: Node, group: NodeGroup, kind: DeviceKind, host: int, store: int, disk_space: int | None) -> Machine:
    memory = kind.memory_bytes if group.device_memory_gib is None else int(group.device_memory_gib * GIB)
    return Machine(
        node=node,
        kind_name=group.device,
        kind=kind,
        devices=group.devices,
        device_memory=memory if group.devices else host,
        host_memory=host,
        object_store=store,
        link=(group.link_gb_s or kind.link_gb_s) * GB,
        network=group.network_gb_s * GB,
        disk=group.disk_gb_s * GB,
        disk_space=disk_space,
    )


def _kind_of(resources: Mapping[str, float], labels: Mapping[str, str], where: str) -> str:
    named = [key.removeprefix("accelerator_type:") for key in resources if key.startswith("accelerator_type:")]
    found = labels.get("ray.io/accelerator-type") or next(iter(named), None)
    if found is None:
        raise PlanError(where, "it has GPUs, but Ray does not say of what kind: give a cluster file instead of live")
    return _known_kind(found, where)


def _known_kind(found: str, where: str) -> str:
    name = RAY_NAMES.get(found, found)
    if name not in DEVICES:
        raise PlanError(
            where,
            f"its GPUs are of kind {found!r}, which the planner does not know (known: {', '.join(DEVICES)}): describe "
            "the cluster in a file with that kind under devices",
        )
    return name


@contextmanager
def live_hardware(address: str) -> Iterator[Hardware]:
    """What Ray reports of its nodes, and what of them is free now.

    Raises:
        ClusterError: when there is no cluster at `address`.
        PlanError: when its devices are of a kind that is not known.
    """
    import ray

    from rlhf_ray.cluster.session import ray_session

    with ray_session(Cluster(address=address), "plan"):
        yield of_ray(ray.nodes(), ray._private.state.available_resources_per_node(), address)
