"""Who leaves and who comes, phase by phase."""

from itertools import product

from rlhf_ray.cluster.sharing import DeviceSharing
from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.roles import Level, needs_by_phase

OUT, WEIGHTS, FULL = Level.OUT, Level.WEIGHTS, Level.FULL
ALL = ("policy", "critic", "reference", "reward", "rollout")
NEEDS = needs_by_phase(
    PPOJob(
        job="ppo",
        name="all",
        policy={"model": "policy"},
        reward=[{"model": "reward"}],
        data={"prompts": "prompts", "prompts_per_step": 8},
        run={"dir": "run", "steps": 1},
    ).roles
)
STEP = ["generate", "score", "update", "sync"]


def test_everyone_on_one_place_goes_through_a_step() -> None:
    sharing = DeviceSharing([("policy", "reference", "rollout")], NEEDS)
    assert [sharing.enter(phase) for phase in STEP * 2] == [
        [{"rollout": FULL}],
        [{"rollout": OUT}, {"policy": WEIGHTS, "reference": WEIGHTS}],
        [{"reference": OUT}, {"policy": FULL}],
        [{"policy": WEIGHTS}, {"rollout": WEIGHTS}],
        [{"policy": OUT}, {"rollout": FULL}],
        [{"rollout": OUT}, {"policy": WEIGHTS, "reference": WEIGHTS}],
        [{"reference": OUT}, {"policy": FULL}],
        [{"policy": WEIGHTS}, {"rollout": WEIGHTS}],
    ]


def test_nobody_leaves_for_a_phase_that_needs_nobody_else_of_the_place() -> None:
    sharing = DeviceSharing([("policy", "reference"), ("critic", "reward")], NEEDS)
    for phase in STEP:
        sharing.enter(phase)
    assert sharing.levels == {"policy": FULL, "reference": OUT, "critic": FULL, "reward": OUT}
    assert sharing.enter("generate") == [], "the engines have devices of their own"
    assert sharing.enter("score") == [
        {"policy": WEIGHTS, "critic": WEIGHTS},
        {"reference": WEIGHTS, "reward": WEIGHTS},
    ]


def test_roles_of_one_place_take_turns_where_each_wants_all_of_it() -> None:
    together = DeviceSharing([ALL], NEEDS)
    assert together.turns(["critic", "policy"]) == [["critic"], ["policy"]]
    assert together.enter("update", ["critic"]) == [{"critic": FULL}]
    assert together.enter("update", ["policy"]) == [{"critic": OUT}, {"policy": FULL}]
    apart = DeviceSharing([("policy", "reference"), ("critic", "reward")], NEEDS)
    assert apart.turns(["critic", "policy"]) == [["critic", "policy"]]
    assert DeviceSharing([], NEEDS).turns(["critic", "policy"]) == [["critic", "policy"]]


def test_after_any_phases_all_that_are_needed_are_there_and_two_never_fill_a_place() -> None:
    for together in ([ALL], [("policy", "rollout"), ("critic", "reward", "reference")], [("policy", "critic")]):
        for phases in product(NEEDS, repeat=3):
            sharing = DeviceSharing(together, NEEDS)
            for phase in phases:
                for turn in sharing.turns(NEEDS[phase]):
                    sharing.enter(phase, turn)
                    for role in turn:
                        assert sharing.levels.get(role, FULL) >= NEEDS[phase][role]
                    for roles in together:
                        full = [role for role in roles if sharing.levels[role] == FULL]
                        assert len(full) <= 1, (together, phases, full)


def test_roles_that_share_nothing_never_move() -> None:
    sharing = DeviceSharing([], NEEDS)
    assert [sharing.enter(phase) for phase in STEP] == [[], [], [], []]
    assert sharing.levels == {}
