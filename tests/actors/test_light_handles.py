"""Who holds an actor's handle imports nothing for it."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import ray.cloudpickle

from rlhf_ray.actors.critic import CriticWorker
from rlhf_ray.actors.policy import PolicyWorker
from rlhf_ray.actors.rollout import RolloutWorker
from rlhf_ray.actors.watched import actor_class

_LOAD = """
import sys, ray.cloudpickle
loaded = ray.cloudpickle.loads(open(sys.argv[1], "rb").read())
heavy = ("rlhf_ray", "torch", "transformers", "deepspeed")
print(loaded.__name__, [name for name in heavy if name in sys.modules])
"""


def shown(worker: type) -> type:
    """The class as Ray exports it, under a pickle in place of Ray's store."""
    exported: type = actor_class(worker).__ray_metadata__.modified_class
    return exported


@pytest.mark.parametrize("worker", [PolicyWorker, CriticWorker, RolloutWorker])
def test_a_handle_imports_nothing_of_its_actor(worker: type, tmp_path: Path) -> None:
    pickled = tmp_path / "class"
    pickled.write_bytes(ray.cloudpickle.dumps(shown(worker)))

    answer = subprocess.run(
        [sys.executable, "-c", _LOAD, str(pickled)], capture_output=True, text=True, check=True, timeout=60
    )

    assert answer.stdout.split(maxsplit=1) == [worker.__name__, "[]\n"]


@pytest.mark.parametrize("worker", [PolicyWorker, RolloutWorker])
def test_a_handle_has_the_actors_methods_with_their_arguments_and_kinds(worker: type) -> None:
    for name, method in inspect.getmembers(worker, inspect.isfunction):
        own = getattr(shown(worker), name)
        taken = [each for each in inspect.signature(own).parameters if each != "_ray_trace_ctx"]  # Ray adds that
        assert taken == list(inspect.signature(method).parameters), name
        assert inspect.iscoroutinefunction(own) == inspect.iscoroutinefunction(method), name
        group = "__ray_concurrency_group__"
        assert getattr(own, group, None) == getattr(method, group, None), name
