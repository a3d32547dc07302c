"""Which CPUs of a cluster multiply in bfloat16: what `dtype: auto` depends on for roles that compute on CPUs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.cluster.assignment import can_take, requests_of
from rlhf_ray.cluster.preflight.probe import NodeProbe
from rlhf_ray.cluster.preflight.probing import Deadline, node_probes
from rlhf_ray.cluster.topology import Node, live_nodes
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.number_formats import Look, engines_of, on_gpus
from rlhf_ray.platform import ISA_VARIABLES, CpuProducts, cpu_products

ANSWER_S = 20.0
"""Until a probe answers: its process has to start."""


@dataclass(frozen=True)
class Processor:
    """The CPU of a node.

    Attributes:
        cpuinfo: as the node's /proc/cpuinfo has it.
        environ: of processes that Ray starts there, as far as it decides about a number format.
    """

    cpuinfo: str
    environ: Mapping[str, str]


def look_here(config: Job) -> Look:
    """For a job whose roles all come to this machine."""
    own = Processor(**NodeProbe().processor(list(ISA_VARIABLES)))
    return lambda role: {"this machine": _products(config, role, own)}


def look_at_cluster(config: Job) -> Look:
    """For a job on the cluster that this process is connected to. The nodes are asked when a role computes on a CPU
    and its number format depends on it."""
    nodes = live_nodes()
    asking = [
        key
        for key, engine in engines_of(config).items()
        if engine.dtype_choice != "float32" and not on_gpus(config, key.partition(".")[0])
    ]
    return look_at(config, nodes, _processors(nodes) if asking else {})


def look_at(config: Job, nodes: Sequence[Node], processors: Mapping[str, Processor]) -> Look:
    """For a job on these nodes, of which a role may come to any that has what it asks for.

    Args:
        processors: by name of the node; a node that is not in it did not answer.
    """
    requests = {request.role: request for request in requests_of(config.placements)}

    def look(role: str) -> dict[str, CpuProducts]:
        request = requests[config.placements[role].colocate or role]
        return {
            "this machine" if len(nodes) == 1 else f"node {node.name}": _products(
                config, role, processors.get(node.name)
            )
            for node in nodes
            if can_take(request, node)
        }

    return look


def _processors(nodes: Sequence[Node]) -> dict[str, Processor]:
    with node_probes(NodeProbe, nodes, Deadline(ANSWER_S)) as probes:
        answers, _ = probes.ask_all("processor", list(ISA_VARIABLES), limit_s=ANSWER_S)
    return {name: Processor(**answer) for name, answer in answers.items()}


def _products(config: Job, role: str, processor: Processor | None) -> CpuProducts:
    """Of a process of this role there."""
    if processor is None:
        return CpuProducts(False, "is not known, since its node did not answer", "perhaps many times as long")
    return cpu_products(processor.cpuinfo, {**processor.environ, **config.placements[role].env})
