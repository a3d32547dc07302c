"""The actors of the simulation stand in for the real ones."""

import inspect
import subprocess
import sys

import pytest

from benchmarks.simulation import workers
from rlhf_ray.actors.critic import CriticWorker
from rlhf_ray.actors.policy import PolicyWorker
from rlhf_ray.actors.reference import ReferenceWorker
from rlhf_ray.actors.reward import RewardModelWorker
from rlhf_ray.actors.rollout import RolloutWorker

REAL = {
    workers.SimulatedPolicy: PolicyWorker,
    workers.SimulatedCritic: CriticWorker,
    workers.SimulatedReference: ReferenceWorker,
    workers.SimulatedRewardModel: RewardModelWorker,
    workers.SimulatedEngine: RolloutWorker,
}


def signature(method: object) -> list[tuple[str, object, object]]:
    """Names, kinds and defaults; a simulated worker can't name types whose modules import torch."""
    assert callable(method)
    parameters = inspect.signature(method).parameters.values()
    # Ray adds one to the methods of a class that it has made an actor of.
    return [(p.name, p.kind, p.default) for p in parameters if p.name != "_ray_trace_ctx"]


@pytest.mark.parametrize("simulated", REAL, ids=lambda worker: worker.__name__)
def test_methods_take_what_those_of_the_real_worker_take(simulated: type) -> None:
    methods = {
        name: method
        for name, method in inspect.getmembers(simulated, inspect.isfunction)
        if not name.startswith("_") and name != "keep"
    }
    assert "drain_spans" in methods
    for name, method in methods.items():
        real = getattr(REAL[simulated], name)
        assert signature(method) == signature(real), name
        assert inspect.iscoroutinefunction(method) == inspect.iscoroutinefunction(real), name


def test_a_simulated_worker_needs_no_torch() -> None:
    code = "import sys, benchmarks.simulation.workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
