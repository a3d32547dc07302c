"""Has the actors of roles that share devices come and go with the phases of a step."""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import ray

from rlhf_ray.actors.group import Calls, wait_together
from rlhf_ray.actors.waiting import wait_until_made
from rlhf_ray.cluster.sharing import DeviceSharing, Moves
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.roles import Level, needs_by_phase
from rlhf_ray.config.sharing import shared_places


class Movable(Protocol):
    """Actors that can leave their devices."""

    def move(self, level: Level) -> Calls[None]:
        """Have all of them leave their devices, or come back, as far as `level` says."""


class Devices:
    """The devices of a job.

    Args:
        config: of the job. Where its placement does not say that idle roles leave, nothing ever moves.
        groups: actors of each role, by the name that its placement has.
    """

    def __init__(self, config: Job, groups: Mapping[str, Sequence[Movable]]) -> None:
        there = {role: placement for role, placement in config.placements.items() if groups.get(role)}
        self._sharing = DeviceSharing(
            shared_places(there) if config.placement.leaves_idle else [],
            needs_by_phase(config.roles),
            losing=[role.placed_as for role in config.roles if not role.keeps_weights],
        )
        self._groups = groups
        self._timeouts = config.run.timeouts

    def shares(self, role: str) -> bool:
        """Whether a role comes and goes."""
        return role in self._sharing.levels

    def loses_weights(self, role: str) -> bool:
        """Whether a role has lost its weights each time that it comes back."""
        return role in self._sharing.losing

    def lacks_weights(self, role: str) -> bool:
        """Whether a role has lost its weights and not got new ones."""
        return role in self._sharing.empty

    def received(self, phase: str) -> None:
        """Whoever gets new weights in this phase has them."""
        self._sharing.received(phase)

    def loaded(self, role: str) -> None:
        """Have a role leave that has just loaded its models."""
        if self.shares(role):
            self._make({role: Level.OUT})

    def enter(self, phase: str, only: Collection[str] | None = None) -> None:
        """Have everyone who is needed come, and go who is in the way; see `DeviceSharing.enter`."""
        for moves in self._sharing.enter(phase, only):
            self._make(moves)

    def turns(self, roles: Collection[str]) -> list[list[str]]:
        """Roles that can work at the same time, turn by turn."""
        return self._sharing.turns(roles)

    def finish(self, refs: Sequence[ray.ObjectRef], what: str) -> None:
        """Wait until others have made these objects, before those who make them leave."""
        if self._sharing.levels:
            wait_until_made(refs, self._timeouts.score_s, what, "run.timeouts.score_s")

    def _make(self, moves: Moves) -> None:
        calls = [group.move(level) for role, level in moves.items() for group in self._groups[role]]
        what = ", ".join(f"{role} going to {level.name.lower()}" for role, level in moves.items())
        wait_together(calls, self._timeouts.sync, what)
