"""In which order the roles of a PPO job load their models."""

from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.loading import parse_config
from rlhf_ray.controllers import ppo_roles, roles


def order(monkeypatch: pytest.MonkeyPatch, **placement: Any) -> list[str]:
    """What is started, as `role`, and what is waited for, as `role there`."""
    config = parse_config(
        {
            "job": "ppo",
            "name": "n",
            "policy": {"model": "m"},
            "critic": {"init_from": "m"},
            "reward": [{"model": "m"}],
            "data": {"prompts": "p", "prompts_per_step": 8},
            "placement": placement,
            "run": {"dir": "d", "steps": 1},
        }
    )
    assert isinstance(config, PPOJob)
    happened: list[str] = []

    def start(role: str) -> list[str]:
        happened.append(role)
        return [role]

    def wait_together(calls: list[str], *_: Any) -> None:
        happened.extend(f"{role} there" for role in calls)

    def start_of(role: str) -> Any:
        return lambda: start(role)

    loaded = ("rollout", "policy", "critic", "reward", "reference")
    monkeypatch.setattr(ppo_roles, "_ppo_loads", lambda *_: {role: start_of(role) for role in loaded})
    monkeypatch.setattr(ppo_roles, "join_collectives_of", lambda *_: happened.append("joined"))
    for module in (ppo_roles, roles):
        monkeypatch.setattr(module, "wait_together", wait_together)
    connected = SimpleNamespace(wait=lambda _: happened.append("connected"))
    policy = SimpleNamespace(connect=lambda *_, **__: connected)
    sharing = config.placement.offload_idle
    devices = SimpleNamespace(shares=lambda _: sharing, loaded=lambda role: happened.append(f"{role} leaves"))
    started = SimpleNamespace(
        policy=policy, models=[], reward_models=[], devices=devices, rollout=SimpleNamespace(actors=[])
    )
    ppo_roles._load_ppo_models(config, SimpleNamespace(), started)  # type: ignore[arg-type]
    return happened


def test_engines_beside_trainers_have_measured_their_devices_before_anybody_loads_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = order(monkeypatch, rollout={"colocate": "policy"})
    assert found[:4] == ["rollout", "rollout there", "joined", "policy"]


def test_engines_on_devices_of_their_own_load_while_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found = order(monkeypatch)
    assert found.index("rollout there") > found.index("reference")
    assert found[-1] == "connected"
