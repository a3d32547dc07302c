"""Exceptions cross process borders pickled, which takes `__reduce__` unless the message is their only argument."""

import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Iterator

import pytest

import rlhf_ray
from rlhf_ray.actors.trained import NonFiniteLossError
from rlhf_ray.actors.waiting import ActorDied, RoleTimeout, TaskFailed
from rlhf_ray.algorithms.errors import OptionError, SampleError, TensorInputError
from rlhf_ray.cluster.assignment import PlacementError
from rlhf_ray.data.errors import RowProblem
from rlhf_ray.models.heads import ModelError

# What runs inside actors; errors of the controller and of `prepare` never leave their process.
IN_ACTORS = ("actors", "algorithms", "cluster", "data", "engines", "models", "rewards")


def exceptions() -> Iterator[type[Exception]]:
    for package in IN_ACTORS:
        for module in pkgutil.walk_packages([f"{rlhf_ray.__path__[0]}/{package}"], f"rlhf_ray.{package}."):
            for _, found in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
                stays = module.name.startswith("rlhf_ray.data.prepare.")
                if issubclass(found, Exception) and found.__module__ == module.name and not stays:
                    yield found


def test_every_exception_with_arguments_of_its_own_can_be_pickled() -> None:
    found = list(exceptions())
    assert len(found) > 12
    unfit = [e.__name__ for e in found if e.__init__ is not e.__base__.__init__ and "__reduce__" not in vars(e)]  # type: ignore[union-attr,misc]
    assert not unfit, f"these would arrive as something else: {', '.join(unfit)}"


@pytest.mark.parametrize(
    "error",
    [
        OptionError("clip", 2.0, "below 1"),
        TensorInputError("values", "shape (3,)", "[tokens]"),
        SampleError([1, 2], "are empty", "leave them out"),
        ModelError("models/x", "no such folder"),
        RowProblem("is long " * 1000),
        NonFiniteLossError("policy", "loss", float("inf"), ["a#0"]),
        ActorDied("policy", 1, "policy: update", "its process died", "ab12"),
        TaskFailed("policy", 1, "policy: update", "ZeroDivisionError: 1 / 0", "ray::PolicyWorker.update()"),
        RoleTimeout("policy: update", 3.0, "run.timeouts.update_s"),
        PlacementError("policy", "no place", 2, {"10.0.0.1": "has 1 GPU"}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_message_and_attributes_arrive(error: Exception) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
