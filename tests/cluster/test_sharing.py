"""Who leaves and who comes, phase by phase."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.cluster.sharing import DeviceSharing, Moves
from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.roles import Level, needs_by_phase
from rlhf_ray.engines.held_weights import HeldWeights, WeightsMissing

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


ROLES_OF_A_PLACE = st.permutations(ALL).flatmap(
    lambda roles: st.integers(1, len(ALL)).map(lambda cut: [tuple(roles[:cut]), tuple(roles[cut:])])
)
PHASES: st.SearchStrategy[list[str]] = st.lists(st.sampled_from(sorted(NEEDS)), max_size=12)


class Run:
    """What the actors of a run hold while its controller goes through phases, as they are told by `DeviceSharing`.

    Args:
        keeps: whether the engine keeps weights that leave its device, as it does where adapters alone are sent.
    """

    def __init__(self, together: list[tuple[str, ...]], *, keeps: bool) -> None:
        self.sharing = DeviceSharing(together, NEEDS, () if keeps else ("rollout",))
        self.together = together
        self.engine = HeldWeights(keeps=keeps)
        self.engine.has(0)
        self.trainers = {role: FULL for role in ALL if role != "rollout"}
        self.version = 0
        for role in self.sharing.levels:  # after loading
            self.make({role: OUT})

    def make(self, moves: Moves) -> None:
        for role, level in moves.items():
            if role == "rollout":
                self.engine.moved(level)
            else:
                self.trainers[role] = level

    def level(self, role: str) -> Level:
        return self.engine.level if role == "rollout" else self.trainers[role]

    def enter(self, phase: str, only: list[str] | None = None) -> None:
        taking_part = [role for role in NEEDS[phase] if only is None or role in only]
        for turn in self.sharing.turns(taking_part) if phase in ("update", "checkpoint") else [taking_part]:
            for moves in self.sharing.enter(phase, turn):
                self.make(moves)
            for role in turn:
                assert self.level(role) >= NEEDS[phase][role], (phase, role)
            for roles in self.together:
                assert sum(self.level(role) == FULL for role in roles if role in self.sharing.levels) <= 1

    def sync(self) -> None:
        self.enter("sync")
        self.engine.arriving()
        self.engine.has(self.version)
        self.sharing.received("sync")

    def go(self, phase: str) -> None:
        """As the controller does: engines get weights after an update, and before they generate if they lack them."""
        if phase == "generate" and self.sharing.empty:
            self.sync()
        if phase == "sync":
            self.sync()
        else:
            self.enter(phase)
        if phase == "update":
            self.version += 1
            self.sync()
        if phase == "generate":
            self.engine.check_generating()
            assert self.engine.version == self.version
        assert (self.engine.version is None) == bool(self.sharing.empty), "the controller knows what the engine knows"


@given(together=ROLES_OF_A_PLACE, phases=PHASES)
def test_in_whatever_order_phases_come_an_engine_generates_with_the_weights_that_it_was_sent(
    together: list[tuple[str, ...]], phases: list[str]
) -> None:
    run = Run([roles for roles in together if len(roles) > 1], keeps=False)
    for phase in phases:
        run.go(phase)
    for phase in ("update", "sync", "checkpoint", "export", "score", "generate"):
        run.go(phase)


@given(together=ROLES_OF_A_PLACE, phases=PHASES)
def test_an_engine_that_keeps_its_weights_never_lacks_them(together: list[tuple[str, ...]], phases: list[str]) -> None:
    run = Run([roles for roles in together if len(roles) > 1], keeps=True)
    for phase in phases:
        run.go(phase)
        assert run.engine.version is not None


@pytest.mark.parametrize("between", ["checkpoint", "score", "update"])
def test_nobody_enters_a_phase_without_the_weights_that_it_takes(between: str) -> None:
    sharing = DeviceSharing([ALL], NEEDS, losing=["rollout"])
    sharing.enter("sync")
    sharing.received("sync")
    sharing.enter("generate")
    for turn in sharing.turns(NEEDS[between]):
        sharing.enter(between, turn)
    with pytest.raises(WeightsMissing, match="rollout can't generate: it left its devices .* A weight sync") as caught:
        sharing.enter("generate")
    assert (caught.value.role, caught.value.work) == ("rollout", "generate")
    sharing.enter("sync")
    with pytest.raises(WeightsMissing):
        sharing.enter("generate")
    sharing.received("sync")
    assert sharing.enter("generate") == [{"policy": OUT}, {"rollout": FULL}]
