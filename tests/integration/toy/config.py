"""A job of one's own: a student learns texts, each weighed by how often a teller finds a word in it."""

from typing import Annotated

from pydantic import Field

from rlhf_ray.config.base import PositiveInt, Section
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.paths import UsablePath
from rlhf_ray.config.placement import JobPlacement, RolePlacement
from rlhf_ray.config.roles import Level, ModelSource, PhaseSpec, RoleSpec, StepShape
from rlhf_ray.config.run import Run
from rlhf_ray.config.training import SFTPolicy


class Teller(Section):
    """Who weighs texts."""

    word: Annotated[str, Field(min_length=1)] = "a"
    """What it looks for."""


class Texts(Section):
    """What the student learns."""

    texts: UsablePath
    """A file with one text a line."""
    rows_per_step: PositiveInt = 4
    """Lines in one optimizer step."""
    max_tokens: PositiveInt = 32
    """Tokens of a line that count."""


class ToyPlacement(JobPlacement):
    """The student has a place, the teller needs none."""

    student: RolePlacement = RolePlacement()
    """Ranks of the student."""


class ToyRun(Run):
    """A run of so many steps."""

    steps: PositiveInt
    """Optimizer steps."""


class ToyJob(Job):
    """Texts by weight."""

    definition = "toy.job:TOY"

    job: str
    """The job type."""
    student: SFTPolicy
    """The model that is trained."""
    teller: Teller = Teller()
    """Who weighs texts."""
    data: Texts
    """The texts."""
    placement: ToyPlacement = ToyPlacement()
    """Where actors sit."""
    run: ToyRun
    """The run."""

    @property
    def roles(self) -> tuple[RoleSpec, ...]:
        """The student and the teller."""
        at = self.placement.student
        student = RoleSpec(
            name="student",
            kind="causal",
            section="student",
            model=ModelSource("student.model", self.student.model, self.student.trust_remote_code),
            engine=self.student.engine,
            placed_as="student",
            placement=at,
            ranks=at.ranks or 1,
            needs={"update": Level.FULL, "checkpoint": Level.FULL, "export": Level.WEIGHTS},
            lora=self.student.lora,
            trained=True,
            checkpointed=True,
            exported=True,
        )
        teller = RoleSpec(
            name="teller",
            kind="texts",
            section="teller",
            model=None,
            engine=None,
            placed_as="teller",
            placement=None,
            ranks=1,
            needs={"score": Level.WEIGHTS},
        )
        return student, teller

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        """Weigh, learn, write."""
        return (
            PhaseSpec("score"),
            PhaseSpec("update", after=("score",)),
            PhaseSpec("checkpoint", after=("update",)),
            PhaseSpec("export", after=("checkpoint",)),
        )

    @property
    def step_shape(self) -> StepShape:
        """All of a text is learnt."""
        return StepShape(samples=self.data.rows_per_step, prompt=0, response=self.data.max_tokens)

    @property
    def data_files(self) -> dict[str, str]:
        """The texts."""
        return {"data.texts": self.data.texts}
