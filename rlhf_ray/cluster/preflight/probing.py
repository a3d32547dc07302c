"""One probe on every node: asked together, and told apart when they fail."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_ray.cluster.topology import Node


class Deadline:
    """A limit that several waits share."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds until then, never less than a moment."""
        return max(0.1, self._end - time.monotonic())


class Probes:
    """A probe on each of some nodes.

    Attributes:
        lost: why a node no longer answers, by its name. It is asked no more.
    """

    def __init__(self, actors: Mapping[str, Any], deadline: Deadline) -> None:
        self._actors = dict(actors)
        self._deadline = deadline
        self.lost: dict[str, str] = {}

    def ask(
        self, method: str, arguments: Mapping[str, tuple[Any, ...]], limit_s: float
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Call a method on some nodes at the same time.

        Args:
            arguments: of each node's call.
            limit_s: seconds for all of them.

        Returns:
            Answers, and for the calls that raised the reasons, both by node.
        """
        refs = {
            name: getattr(self._actors[name], method).remote(*given)
            for name, given in arguments.items()
            if name not in self.lost
        }
        limit = min(limit_s, self._deadline.left_s)
        ready = set(ray.wait(list(refs.values()), num_returns=len(refs), timeout=limit)[0]) if refs else set()
        answers: dict[str, Any] = {}
        raised: dict[str, str] = {}
        for name, ref in refs.items():
            if ref not in ready:
                self.lost[name] = f"did not answer within {limit:.0f} s"
                continue
            try:
                answers[name] = ray.get(ref, timeout=10)
            except RayTaskError as error:
                raised[name] = _reason(error.cause)
            except RayError as error:
                self.lost[name] = f"was lost ({_reason(error)})"
        return answers, raised

    def ask_all(self, method: str, *arguments: Any, limit_s: float) -> tuple[dict[str, Any], dict[str, str]]:
        """As `ask`, the same of every node."""
        return self.ask(method, dict.fromkeys(self._actors, arguments), limit_s)


class OwnProbe(Probes):
    """A probe in this process, for a cluster that this process started: its workers run the same Python here, so there
    is nothing that they could see otherwise."""

    def __init__(self, probe: object, node: Node) -> None:
        super().__init__({node.name: probe}, Deadline(0))

    def ask(
        self, method: str, arguments: Mapping[str, tuple[Any, ...]], limit_s: float
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """As with others, but here."""
        answers: dict[str, Any] = {}
        raised: dict[str, str] = {}
        for name, given in arguments.items():
            try:
                answers[name] = getattr(self._actors[name], method)(*given)
            except OSError as error:
                raised[name] = _reason(error)
        return answers, raised


@contextmanager
def node_probes(probe: type, nodes: Sequence[Node], deadline: Deadline) -> Iterator[Probes]:
    """A probe for each node of the cluster."""
    if len(nodes) == 1 and ray._private.worker.global_worker.node.is_head():  # which this process started, then
        yield OwnProbe(probe(), nodes[0])
    else:
        with probes(probe, nodes, deadline) as started:
            yield started


@contextmanager
def probes(probe: type, nodes: Sequence[Node], deadline: Deadline, **options: Any) -> Iterator[Probes]:
    """Start a probe on each node, its class sent by value, since the nodes need not have it."""
    module = sys.modules[probe.__module__]
    remote = ray.remote(probe)
    actors = {}
    cloudpickle.register_pickle_by_value(module)
    try:
        for node in nodes:
            pinned = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            actors[node.name] = remote.options(
                num_cpus=0, scheduling_strategy=pinned, max_restarts=0, **options
            ).remote()
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    try:
        yield Probes(actors, deadline)
    finally:
        for actor in actors.values():
            ray.kill(actor)


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0]
