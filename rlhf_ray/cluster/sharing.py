"""Roles that share devices and leave them to each other: which of them is where in which phase.

A pure state machine. It says who must go and who may come; `actors/devices.py` has the actors do it.
"""

from collections.abc import Collection, Mapping, Sequence

from rlhf_ray.config.roles import Level
from rlhf_ray.engines.held_weights import DROPPED, SYNC_FIRST, WeightsMissing

# Who gets new weights in a phase, and so need have none before it.
RECEIVES = {"sync": "rollout"}

Moves = dict[str, Level]


class DeviceSharing:
    """Levels of the roles that share devices. All begin outside.

    Args:
        together: lists of roles that sit on the same devices; a role is in one of them at most.
        needs: for each phase, the roles that work in it and what they must have on their devices then.
        losing: roles that lose their weights when they go, instead of taking them to host memory.

    Attributes:
        levels: of the roles that share devices.
        empty: roles that have lost their weights and not got new ones.
    """

    def __init__(
        self,
        together: Sequence[Sequence[str]],
        needs: Mapping[str, Mapping[str, Level]],
        losing: Collection[str] = (),
    ) -> None:
        self._together = [tuple(roles) for roles in together]
        self._needs = needs
        self.levels = {role: Level.OUT for roles in together for role in roles}
        self.losing = frozenset(losing) & self.levels.keys()
        self.empty = set(self.losing)

    def enter(self, phase: str, only: Collection[str] | None = None) -> list[Moves]:
        """Moves that bring about what a phase needs, to be made one after the other: those that go, those that come.

        Where somebody comes, all others on the same devices go as far as the phase lets them. Where nobody comes,
        nobody goes: moving costs time, and idle states cost nothing.

        Args:
            only: roles that take part; by default all that the phase needs.

        Raises:
            WeightsMissing: a role that takes part has none, and the phase gives it none.
        """
        needs = {role: level for role, level in self._needs[phase].items() if only is None or role in only}
        for role in sorted(self.empty & needs.keys()):
            if RECEIVES.get(phase) != role:
                raise WeightsMissing(role, phase, DROPPED, SYNC_FIRST)
        going: Moves = {}
        coming: Moves = {}
        for roles in self._together:
            short = {role: needs[role] for role in roles if self.levels[role] < needs.get(role, Level.OUT)}
            if short:
                coming |= short
                going |= {r: needs.get(r, Level.OUT) for r in roles if self.levels[r] > needs.get(r, Level.OUT)}
        self.levels |= going | coming
        self.empty |= self.losing & going.keys()
        return [moves for moves in (going, coming) if moves]

    def received(self, phase: str) -> None:
        """Whoever gets new weights in this phase has them."""
        self.empty.discard(RECEIVES[phase])

    def turns(self, roles: Collection[str]) -> list[list[str]]:
        """Roles that would work at the same time, so divided that no two of a turn share devices."""
        turns: list[list[str]] = []
        for role in roles:
            free = next((turn for turn in turns if not any(self._are_together(role, other) for other in turn)), None)
            if free is None:
                turns.append([role])
            else:
                free.append(role)
        return turns

    def _are_together(self, role: str, other: str) -> bool:
        return any(role in roles and other in roles for roles in self._together)
