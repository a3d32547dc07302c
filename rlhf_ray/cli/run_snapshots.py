"""Where the status of runs comes from: the status actors of a cluster while they go on, their folders afterwards."""

import logging
from pathlib import Path

from rlhf_ray.cluster.client import ClusterClient
from rlhf_ray.cluster.session import ClusterError
from rlhf_ray.telemetry.manifest import last_session
from rlhf_ray.telemetry.record import RunRecord, read_record
from rlhf_ray.telemetry.status import RunStatus
from rlhf_ray.telemetry.status_actor import read_status_actor, status_actors

logger = logging.getLogger("rlhf_ray")

Snapshot = RunStatus | RunRecord

# A status actor that is there answers within seconds, of which an actor that doesn't costs it two.
_ANSWER_S = 20.0
_LOOK_S = 60.0


class FolderSight:
    """One run: through its status actor as long as there is one, else as its folder tells.

    Args:
        folder: of the run.
        address: of its cluster; None takes the one that the folder names, and does without when it is gone.
    """

    def __init__(self, folder: Path, address: str | None) -> None:
        self._folder, self._address = folder, address
        self._client: ClusterClient | None = None
        self._told = ""

    def look(self) -> list[Snapshot]:
        """The run.

        Raises:
            ClusterError: an address was given, and nothing answers there.
        """
        session = last_session(self._folder)
        if session.end is None:
            try:
                if self._client is None:
                    self._client = ClusterClient(self._address or session.address, _LOOK_S)
                found = self._client.ask(read_status_actor, session.status_actor, _ANSWER_S)
            except ClusterError as error:
                if self._address is not None:
                    raise
                if str(error) != self._told:
                    logger.warning("%s; what follows is from the run's folder", error)
                self.close()
                self._client, found, self._told = None, None, str(error)
            if found is not None:
                return [found]
        return [read_record(self._folder)]  # anew: it may have ended just then

    def close(self) -> None:
        """Leave the cluster."""
        if self._client is not None:
            self._client.close()


class ClusterSight:
    """The runs of a cluster.

    Args:
        name: of those to look at; None looks at all.
    """

    def __init__(self, address: str, name: str | None) -> None:
        self._address, self._name = address, name
        self._looked = False
        self._client = ClusterClient(address, _LOOK_S)

    def look(self) -> list[Snapshot]:
        """All that answer.

        Raises:
            ClusterError: at the first look, when there is none of that name.
        """
        every = [
            self._client.ask(read_status_actor, status_actor, _ANSWER_S)
            for status_actor in self._client.ask(status_actors)
        ]
        found = [status for status in every if status is not None and self._name in (None, status.about.name)]
        if not found and not self._looked and self._name is not None:
            others = ", ".join(sorted(status.about.name for status in every if status is not None)) or "none"
            raise ClusterError(
                f"no run named {self._name!r} goes on at {self._address}; those that do: {others}. Of a run that is "
                "over, give the folder"
            )
        self._looked = True
        return list(found)

    def close(self) -> None:
        """Leave the cluster."""
        self._client.close()


def newest_run(folder: Path) -> Path | None:
    """The run among the subfolders that was started last."""
    started = {path.parent: last_session(path.parent).started_utc for path in folder.glob("*/manifest.json")}
    return max(started, key=lambda run: started[run]) if started else None
