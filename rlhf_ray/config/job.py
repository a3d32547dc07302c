"""What every job has."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from rlhf_ray.config.base import Section
from rlhf_ray.config.placement import Cluster, JobPlacement, RolePlacement, RolloutPlacement
from rlhf_ray.config.roles import PhaseSpec, RoleSpec, StepShape
from rlhf_ray.config.run import Run


class Job(Section):
    """What every job has. A job type adds its sections and declares its roles and the phases of its step."""

    definition: ClassVar[str]
    """Path of the `JobDefinition` (controllers/job.py) that runs it."""
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=100)
    """Name of the run, in telemetry and Ray."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random."""
    cluster: Cluster = Cluster()
    """The Ray cluster."""

    if TYPE_CHECKING:  # fields of each job type, which have their places among its sections
        job: str
        placement: JobPlacement
        run: Run

    @property
    @abstractmethod
    def roles(self) -> tuple[RoleSpec, ...]:
        """The role table, in the order in which roles are shown."""

    @property
    @abstractmethod
    def phases(self) -> tuple[PhaseSpec, ...]:
        """The phase table: the phases of a step, in order."""

    @property
    @abstractmethod
    def step_shape(self) -> StepShape:
        """How many samples or rows a step has, and how long they are at most."""

    def role(self, name: str) -> RoleSpec:
        """The row of a role. Raises KeyError for a name that is not in the table."""
        return {role.name: role for role in self.roles}[name]

    @property
    @abstractmethod
    def data_files(self) -> dict[str, str]:
        """Data that the controller reads, by the setting that names them."""

    @property
    def folders(self) -> dict[str, str]:
        """Folders that the controller writes, by the setting that names them."""
        return {"run.dir": self.run.dir}

    @property
    def placements(self) -> dict[str, RolePlacement | RolloutPlacement]:
        """The sections of the roles that reserve bundles, by the name that `placement` has for them."""
        return {role.placed_as: role.placement for role in self.roles if role.placement is not None}
