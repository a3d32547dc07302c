"""The base of all actors: while its role's work runs, it tells from another thread what it does and that it lives."""

import os
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import ray

from rlhf_ray.actors.host_memory import host_bytes
from rlhf_ray.telemetry.status import Activity, phase_of
from rlhf_ray.telemetry.trace import Span, SpanRecorder

_GROUP = "status"
_LIFE = "life"

_LOOK_EVERY_S = 0.5
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _in_thread(group: str) -> Callable[[_Method], _Method]:
    """Have Ray run a method in a thread of a group, beside the other methods."""
    decorate: Callable[[_Method], _Method] = ray.method(concurrency_group=group)
    return decorate


class Watched:
    """An actor that records spans. Its class goes through `actor_class`.

    Attributes:
        recorder: of its spans.
    """

    recorder: SpanRecorder

    @_in_thread(_GROUP)
    def activity(self) -> Activity:
        """What this process does right now; Ray runs it in a thread of its own, beside the role's work."""
        phase, since_s = phase_of(self.recorder.open(), self.recorder.idle_since_s)
        running, waiting, version = self.queue()
        node, node_id = self._node
        return Activity(
            phase=phase,
            since_s=since_s,
            node=node,
            node_id=node_id,
            pid=os.getpid(),
            host_bytes=host_bytes(),
            device_bytes=self.device_bytes(),
            running=running,
            waiting=waiting,
            version=version,
        )

    @_in_thread(_LIFE)
    def lost_process(self) -> str:
        """Which process died that this one can't work without, and how; there is no answer while all are well."""
        while (lost := self.find_lost_process()) is None:
            time.sleep(_LOOK_EVERY_S)
        return lost

    def find_lost_process(self) -> str | None:
        """The same, right now; None while all are well. A role without further processes has none to lose."""
        return None

    def queue(self) -> tuple[int | None, int | None, int | None]:
        """Running and waiting requests, and the version of the weights, of a role that samples."""
        return None, None, None

    def device_bytes(self) -> tuple[int, int] | None:
        """Device memory in use and in all; None for a role without a device."""
        return None

    def drain_spans(self) -> list[Span]:
        """What this process did since the last call."""
        return self.recorder.drain()

    @cached_property
    def _node(self) -> tuple[str, str]:
        return ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()


def actor_class(worker: type) -> Any:
    """Ray's class of actors of a `Watched` class.

    With groups there, Ray runs the other methods in one thread beside the main one: still one at a time, and in order.
    The constructor runs in the main thread.
    """
    return ray.remote(concurrency_groups={_GROUP: 1, _LIFE: 1})(worker)
