"""The base of all actors: while its role's work runs, it tells from another thread what it does and that it lives."""

import inspect
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


def beside_work(method: _Method) -> _Method:
    """Have Ray run a method in a thread of its own, beside the role's work."""
    return _in_thread(_GROUP)(method)


class Watched:
    """An actor that records spans. Its class goes through `actor_class`.

    Attributes:
        recorder: of its spans.
    """

    recorder: SpanRecorder

    @beside_work
    def activity(self) -> Activity:
        """What this process does right now."""
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
    return ray.remote(concurrency_groups={_GROUP: 1, _LIFE: 1})(_light(worker))


def _light(worker: type) -> type:
    """A class of the same name and methods whose instances become a `worker` when they are made.

    Who gets an actor's handle gets its class from Ray, and imports what that imports. With this one it is nothing: the
    status actor, which has the handles of all, would else import torch and DeepSpeed.
    A class that its actor can't import by name, as it is local or the script's own, stays as it is.
    """
    module, name = worker.__module__, worker.__qualname__
    if module == "__main__" or "." in name:
        return worker

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        import importlib

        self.__class__ = getattr(importlib.import_module(module), name)
        self.__init__(*args, **kwargs)

    own = dict(inspect.getmembers(worker, inspect.isfunction))
    constructor = own.pop("__init__", _without_arguments)
    methods = {each: _of_what_it_became(each, method) for each, method in own.items()}
    methods["__init__"] = _described_as(constructor, __init__)
    return type(name, (), {**methods, "__module__": module, "__doc__": worker.__doc__})


def _without_arguments(self: Any) -> None:
    """The constructor of a class that has none of its own."""


def _of_what_it_became(name: str, method: Any) -> Any:
    """Ray calls the functions of the class that it was given."""

    async def call_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await getattr(self, name)(*args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, name)(*args, **kwargs)

    return _described_as(method, call_async if inspect.iscoroutinefunction(method) else call)


def _described_as(original: Any, function: Any) -> Any:
    """Give a function the name and arguments of another and what Ray noted on it, but no types, which would be imported
    with it."""
    signature = inspect.signature(original)
    untyped = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    function.__signature__ = inspect.Signature(untyped)
    function.__annotations__ = {}
    function.__name__, function.__qualname__, function.__doc__ = (
        original.__name__,
        original.__qualname__,
        original.__doc__,
    )
    vars(function).update({name: value for name, value in vars(original).items() if name.startswith("__ray_")})
    return function
