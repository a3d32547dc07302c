"""An engine knows whether it has weights, and generates with none others than those it was sent last; and when it fails
in a weight sync, its own error is what is told.

The actors start once and serve all tests in the order of this file; the last ones leave them unfit for more.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from policy_surgery import change_weights, whole_weights
from rlhf_ray.actors.rollout import RolloutGroup, RolloutWorker
from rlhf_ray.actors.waiting import ActorDied, wait_all
from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.roles import Level
from rlhf_ray.config.run import Limit, Timeouts
from rlhf_ray.controllers.inputs import PPOInputs
from rlhf_ray.controllers.job import check
from rlhf_ray.controllers.ppo_roles import PPORoles, start_ppo_roles
from rlhf_ray.controllers.roles import Actors
from rlhf_ray.data.cursor import PromptCursor
from rlhf_ray.data.requests import PromptRequest, requests_for
from rlhf_ray.engines.held_weights import WeightsMissing
from runs import MakeConfig
from sampling import generated, greedy

SYNC_S = 100.0
LIMIT = Limit(60.0, "no setting: a test")


@pytest.fixture(scope="module")
def config(tiny: Path, ppo_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> PPOJob:
    """Engine and policy leave their place to each other."""
    return ppo_config(
        tmp_path_factory.mktemp("weights") / "run",
        "placement.rollout={colocate: policy}",
        "placement.offload_idle=true",
        "reward=[{function: reward_functions:letters, name: letters}]",
        f"critic.init_from={tiny}/models/tiny",
        f"run.timeouts.sync_s={SYNC_S:g}",
    )


@pytest.fixture(scope="module")
def inputs(config: PPOJob) -> PPOInputs:
    inputs = check(config)
    assert isinstance(inputs, PPOInputs)
    return inputs


@pytest.fixture(scope="module")
def roles(config: PPOJob, inputs: PPOInputs) -> Iterator[PPORoles]:
    class Over(Exception):
        """Ends the actors as a failure does: after the last tests the engine does not answer."""

    with suppress(Over), Actors.of_job(config) as actors:
        yield start_ppo_roles(config, inputs, actors)
        raise Over


@pytest.fixture(scope="module")
def requests(inputs: PPOInputs) -> list[PromptRequest]:
    return requests_for(inputs.prompts, PromptCursor(len(inputs.prompts), 0, True).take(4), 1, run_seed=0)


def in_engine(roles: PPORoles, work: Callable[[Any], Any]) -> Any:
    return wait_all([roles.rollout.actors[0].__ray_call__.remote(work)], 60, "work in the engine's actor", "")[0]


def sync(roles: PPORoles, version: int) -> None:
    roles.devices.enter("sync")
    roles.policy.send_weights(version).wait(Limit(SYNC_S, "no setting: a test"))
    roles.devices.received("sync")


def responses(roles: PPORoles, requests: list[PromptRequest], version: int) -> list[list[int]]:
    batch = generated(roles, 0, requests, version)
    assert set(batch.weight_versions.tolist()) == {version}
    return [batch.response(sample).tolist() for sample in range(len(batch))]


def trainers(roles: PPORoles, config: PPOJob, requests: list[PromptRequest]) -> list[list[int]]:
    weights: dict[str, torch.Tensor] = wait_all(
        [roles.policy.actors[0].__ray_call__.remote(whole_weights)], 60, "weights", ""
    )[0]
    return greedy(weights, config.policy.model, requests)


def test_an_engine_that_left_its_place_after_loading_has_no_weights_and_says_so(
    config: PPOJob, roles: PPORoles, requests: list[PromptRequest]
) -> None:
    assert roles.rollout.versions().wait(LIMIT) == [None]
    assert roles.devices.lacks_weights("rollout")
    with pytest.raises(WeightsMissing, match="rollout can't generate: it left its devices"):
        roles.devices.enter("generate")
    for deterministic in (False, True):
        timeouts = Timeouts(rollout_s=60.0)
        group = RolloutGroup(roles.rollout.actors, config.rollout, deterministic=deterministic, timeouts=timeouts)
        began = time.monotonic()
        with pytest.raises(WeightsMissing, match="dropped its weights. A weight sync has to come first"):
            list(group.generate([requests], version=0))
        assert time.monotonic() - began < 20


def test_it_has_them_after_a_sync_and_loses_them_with_its_place(
    config: PPOJob, roles: PPORoles, requests: list[PromptRequest]
) -> None:
    for version, part in ((3, "mlp"), (4, "self_attn")):
        roles.devices.enter("score", ["policy"])
        wait_all([roles.policy.actors[0].__ray_call__.remote(change_weights, part, version)], 60, "change", "")
        sync(roles, version)
        roles.devices.enter("generate")
        assert roles.rollout.versions().wait(LIMIT) == [version]
        assert responses(roles, requests, version) == trainers(roles, config, requests)
        roles.devices.enter("checkpoint", ["policy"])
        assert roles.devices.lacks_weights("rollout")
        assert roles.rollout.versions().wait(LIMIT) == [None]
        with pytest.raises(WeightsMissing):
            generated(roles, 0, requests, version)


def test_what_an_engine_has_without_a_sync_is_no_model_on_cpu_either(
    config: PPOJob, roles: PPORoles, requests: list[PromptRequest]
) -> None:
    """As on a GPU: else none of these tests could see that a sync was forgotten."""

    def pretend(worker: Any) -> None:
        worker.engine.held.has(4)

    in_engine(roles, pretend)
    roles.rollout.move(Level.FULL).wait(LIMIT)
    batch = generated(roles, 0, requests, 4)
    found = [batch.response(sample).tolist() for sample in range(len(batch))]
    assert found != trainers(roles, config, requests)
    assert not np.isfinite(batch.engine_logprobs).all()
    roles.rollout.move(Level.OUT).wait(LIMIT)


def test_weights_are_not_sent_to_an_engine_that_has_no_memory_for_them(roles: PPORoles) -> None:
    with pytest.raises(WeightsMissing, match="rollout can't take new weights: .* come to level WEIGHTS first"):
        roles.rollout.call(RolloutWorker.start_update).wait(LIMIT)


def kill_the_engine_then_receive(worker: Any) -> None:
    """Have the engine's own process die as soon as weights are on their way."""
    receive = worker.engine.update
    killed = [process for process in psutil.Process().children(recursive=True) if process.name().startswith("VLLM")]

    async def update(update_info: dict[str, Any]) -> None:
        for process in killed:
            process.kill()
        await receive(update_info)

    assert killed, "the engine has a process of its own"
    worker.engine.update = update


def test_an_engine_that_dies_in_a_sync_is_told_at_once(roles: PPORoles) -> None:
    """The trainer, which sits in a broadcast to it, says that a connection was closed; another backend's would wait."""
    sync(roles, 5)
    in_engine(roles, kill_the_engine_then_receive)
    began = time.monotonic()
    with pytest.raises(ActorDied, match=r"rollout/0 died .* vLLM's engine process \d+ was killed by signal SIGKILL"):
        sync(roles, 6)
    assert time.monotonic() - began < 10
