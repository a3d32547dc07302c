"""Has the actors of roles that share devices come and go with the phases of a step."""

from collections.abc import Collection, Mapping, Sequence

import ray

from rlhf_ray.actors.group import ActorGroup
from rlhf_ray.actors.waiting import wait_all, wait_until_made
from rlhf_ray.cluster.sharing import DeviceSharing, Moves, Phase
from rlhf_ray.config.placement import Placed
from rlhf_ray.config.run import Timeouts
from rlhf_ray.config.sharing import shared_places
from rlhf_ray.engines.level import Level


class Devices:
    """The devices of a job.

    Args:
        places: as `JobConfig.places`.
        groups: actors of each role.
        offload_idle: whether roles that share devices leave them; if not, nothing ever moves.
    """

    def __init__(
        self,
        places: Mapping[str, Placed],
        groups: Mapping[str, Sequence[ActorGroup]],
        timeouts: Timeouts,
        *,
        offload_idle: bool,
    ) -> None:
        self._sharing = DeviceSharing(shared_places(places) if offload_idle else [])
        self._groups = groups
        self._timeouts = timeouts

    def shares(self, role: str) -> bool:
        """Whether a role comes and goes."""
        return role in self._sharing.levels

    def loaded(self, role: str) -> None:
        """Have a role leave that has just loaded its models."""
        if self.shares(role):
            self._make({role: Level.OUT})

    def enter(self, phase: Phase, only: Collection[str] | None = None) -> None:
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
        refs = [
            ref for role, level in moves.items() for group in self._groups[role] for ref in group.call("move", level)
        ]
        what = ", ".join(f"{role} going to {level.name.lower()}" for role, level in moves.items())
        wait_all(refs, self._timeouts.sync_s, what, "run.timeouts.sync_s")
