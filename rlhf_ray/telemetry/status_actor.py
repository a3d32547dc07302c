"""The status actor of a run, which knows the run's actors and what its driver told last, and makes snapshots of it.

Others find it by its name, from any process that is connected to the cluster. It lives as long as the driver.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from rlhf_ray.telemetry.status import About, ActorRecord, Progress, RunStatus, without_traceback

NAMESPACE = "rlhf_ray"

# An actor that takes longer to say what it does holds Python's lock for that long.
_PATIENCE_S = 2.0


class StatusActor:
    """Asks all actors of a run what they do, when somebody wants to know."""

    def __init__(self, about: About) -> None:
        self._about = about
        self._progress: Progress | None = None
        self._heard_s = time.time()
        self._watched: dict[str, list[_Watched]] = {}

    async def tell(self, progress: Progress) -> None:
        """The driver says how far it is."""
        self._progress, self._heard_s = progress, time.time()

    async def watch(self, role: str, actors: Sequence[Any]) -> None:
        """These are the ranks of a role, from now on."""
        self._watched[role] = [_Watched(ActorRecord(role, rank), actor) for rank, actor in enumerate(actors)]
        # Of those that die, the node will be known.
        await asyncio.gather(*(watched.ask() for watched in self._watched[role]))

    async def status(self) -> RunStatus:
        """The run, right now."""
        everyone = [watched for _, group in sorted(self._watched.items()) for watched in group]
        await asyncio.gather(*(watched.ask() for watched in everyone))
        actors = tuple(watched.record.status for watched in everyone)
        return RunStatus(time.time(), self._about, self._progress, self._heard_s, actors, _metrics_urls())


class _Watched:
    """One actor. There is one question to it at a time, so that a stuck one does not gather them."""

    def __init__(self, record: ActorRecord, actor: Any) -> None:
        self.record = record
        self._actor = actor
        self._question: asyncio.Future[Any] | None = None

    async def ask(self) -> None:
        from ray.exceptions import (
            ActorDiedError,
            ActorPlacementGroupRemoved,
            ActorUnavailableError,
            ActorUnschedulableError,
        )

        if self.record.status.state == "dead":
            return
        if self._question is None:
            self._question = asyncio.ensure_future(_answer(self._actor))
        question = self._question
        done, _ = await asyncio.wait([question], timeout=_PATIENCE_S)
        if not done:
            self.record.unanswered()
            return
        self._question = None
        error = question.exception()
        if error is None:
            self.record.answered(question.result(), time.time())
        elif isinstance(error, ActorDiedError | ActorPlacementGroupRemoved | ActorUnschedulableError):
            self.record.died(without_traceback(str(error)))
        elif isinstance(error, ActorUnavailableError):
            self.record.unanswered()
        else:
            self.record.failed(f"{type(error).__name__}: {without_traceback(str(error))}", time.time())


def _metrics_urls() -> tuple[str, ...]:
    import ray

    here = ray.get_runtime_context().get_node_id()
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != here)
    return tuple(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in alive)


async def _answer(actor: Any) -> Any:
    return await actor.activity.remote()


def create_status_actor(about: About) -> Any:
    """Start the status actor of a run on this node, and return at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # With the driver it would be lost anyway, with another node it must not be.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return (
        ray.remote(StatusActor)
        .options(name=about.status_actor, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=here)
        .remote(about)
    )


def status_actors() -> list[str]:
    """Names of all status actors in the cluster."""
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in named if actor["namespace"] == NAMESPACE)


def read_status_actor(name: str, timeout_s: float) -> RunStatus | None:
    """What a status actor shows; None when the run has ended or does not answer within `timeout_s`."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    try:
        found: RunStatus = ray.get(ray.get_actor(name, namespace=NAMESPACE).status.remote(), timeout=timeout_s)
    except (ValueError, RayActorError, GetTimeoutError):  # Ray raises ValueError for a name that nobody has
        return None
    return found
