"""What the plugs of an algorithm make of a PPO job: its critic, its groups, where its reward models sit."""

from typing import Any

import pytest

from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.loading import ConfigError, parse_config


def ppo(**sections: Any) -> PPOJob:
    config = parse_config(
        {
            "job": "ppo",
            "name": "x",
            "policy": {"model": "m"},
            "reward": [{"model": "r", "name": "r"}],
            "data": {"prompts": "p", "samples_per_prompt": 4},
            "run": {"dir": "d", "steps": 3},
        }
        | sections
    )
    assert isinstance(config, PPOJob)
    return config


def problem(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        ppo(**sections)
    [found] = caught.value.problems
    return found


def test_a_critic_is_there_where_the_estimator_needs_values() -> None:
    assert [role.name for role in ppo().roles] == ["policy", "critic", "reference", "reward-r", "rollout"]
    assert ppo(critic=None).critic is not None


@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_without_a_critic_there_are_four_roles_and_rewards_sit_with_the_policy(advantage: str) -> None:
    config = ppo(algorithm={"advantage": advantage})
    assert config.critic is None
    assert [role.name for role in config.roles] == ["policy", "reference", "reward-r", "rollout"]
    assert config.placement.reward.colocate == "policy"
    assert not config.algorithm.whiten_advantages


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"critic": {}}, "critic has no effect with algorithm.advantage: grpo, which needs no critic: leave it out"),
        ({"placement": {"critic": {"cpus": 2}}}, "placement.critic has no effect with algorithm.advantage: grpo"),
        ({"placement": {"reward": {"colocate": "critic"}}}, "placement.reward.colocate is 'critic', but with"),
        (
            {"data": {"prompts": "p"}},
            "data.samples_per_prompt is 1, but algorithm.advantage: grpo compares",
        ),
    ],
)
def test_what_grpo_has_no_use_for_is_refused(sections: dict[str, Any], told: str) -> None:
    assert told in problem(algorithm={"advantage": "grpo"}, **sections)


@pytest.mark.parametrize(
    ("key", "name", "told"),
    [
        ("advantage", "gea", "algorithm.advantage: 'gea' is not known; did you mean 'gae'?"),
        ("advantage", "math:pi", "algorithm.advantage: 'math:pi' is of type float, not Estimator"),
        ("policy_loss", "cliped", "algorithm.policy_loss: 'cliped' is not known; did you mean 'clipped'?"),
        ("policy_loss", "no_such_module:f", "algorithm.policy_loss: 'no_such_module:f' can't be imported"),
    ],
)
def test_a_plug_that_is_not_there_is_told_by_its_path(key: str, name: str, told: str) -> None:
    assert told in problem(algorithm={key: name})
