"""The role table and the phase table: what a job declares once of its roles and of the phases of its step.

Everything that walks over roles reads these tables: starting actors, device sharing, preflight, planner, named paths,
status, checkpoints and export. A new role is a new row.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from rlhf_ray.config.placement import RolePlacement, RolloutPlacement
from rlhf_ray.config.rollout import RolloutEngine
from rlhf_ray.config.training import Lora, ScoringEngine, TrainingEngine

RoleKind = Literal["causal", "scalar", "engine", "texts"]
"""A causal model, a model with a scalar head, a rollout engine, or a scorer of texts, which holds no model."""


class Level(IntEnum):
    """What a role has on its devices; the rest is in host memory, or is made again."""

    OUT = 0
    """Nothing."""
    WEIGHTS = 1
    """Weights: enough to compute log-probs, and to send or receive weights."""
    FULL = 2
    """Everything: gradients and optimizer state of a trainer, KV cache of an engine."""


@dataclass(frozen=True)
class PhaseSpec:
    """A phase of a job's step.

    Attributes:
        name: as roles and telemetry name it.
        after: phases of the same step, further up in the table, that must be over before it begins; empty where only
            the data are waited for. The planner's timeline follows it.
    """

    name: str
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepShape:
    """The samples or rows of one step, at most.

    Attributes:
        samples: in a step.
        prompt, response: tokens of a sample that are not learnt, and those that are; of a row, of each of its texts.
        texts: of one sample: 2 where the answers of a row are compared.
        shared_prompt: the texts of a sample share their prompt's tokens.
        last_only: a score is read at the last token of each text, and no vocabulary head is applied.
        samples_per_prompt: samples of one prompt.
        optimizer_steps: that the samples of a step are split into.
        epochs: passes over the samples of a step.
        shard: samples that are scored together; None for all.
    """

    samples: int
    prompt: int
    response: int
    texts: int = 1
    shared_prompt: bool = False
    last_only: bool = False
    samples_per_prompt: int = 1
    optimizer_steps: int = 1
    epochs: int = 1
    shard: int | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, of all its texts together."""
        return (self.prompt + self.response) * self.texts

    @property
    def learnt(self) -> int:
        """Places of the longest sample at which a head is applied."""
        if self.last_only:
            return self.texts
        return self.longest if self.shared_prompt or self.texts > 1 else self.response


@dataclass(frozen=True)
class ModelSource:
    """The model that a role loads.

    Attributes:
        key: dotted path of the setting that names it.
        path: folder or hub name.
        trust_remote_code: whether code that comes with it may run.
    """

    key: str
    path: str
    trust_remote_code: bool = False


@dataclass(frozen=True)
class RoleSpec:
    """A role of a job.

    Attributes:
        name: of its actors.
        kind: what it holds.
        section: dotted path of the section that describes it, such as `reward.0`.
        model: that it loads; None for a scorer of texts.
        engine: how that is held; None for a scorer of texts.
        placed_as: name under which `placement` has it; roles of one name sit on the same bundles.
        placement: its own section there; None for roles that take no resources, and so have no bundles.
        ranks: how many processes it has: ranks of a model, engines, or workers that score texts.
        needs: phases in which it works, and how much of it must be on its devices then.
        lora: its adapters.
        trained: it has an optimizer.
        checkpointed: it writes a part of each checkpoint.
        exported: its model is the result of the job.
        score_passes: forward passes over a step's samples that it makes before the update; 0 for a role that scores
            nothing.
        entropy: its loss has an entropy bonus.
        sync_bytes: most weights in flight at a time when it sends or receives them.
        adapter_rank: of adapters that an engine applies beside its base model, 0 for none.
        keeps_weights: it takes them to host memory where it leaves its devices; else it drops them, and needs new ones.
        modules: Python modules that it imports on its nodes, by the setting that names them.
        variables: environment variables that it reads on its nodes, by the setting that names them.
    """

    name: str
    kind: RoleKind
    section: str
    model: ModelSource | None
    engine: TrainingEngine | ScoringEngine | RolloutEngine | None
    placed_as: str
    placement: RolePlacement | RolloutPlacement | None
    ranks: int
    needs: Mapping[str, Level] = field(default_factory=dict)
    lora: Lora | None = None
    trained: bool = False
    checkpointed: bool = False
    exported: bool = False
    keeps_weights: bool = True
    score_passes: int = 0
    entropy: bool = False
    sync_bytes: int = 0
    adapter_rank: int = 0
    modules: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def model_engine(self) -> TrainingEngine | ScoringEngine | None:
        """How its model is held, of a role that holds one in ranks."""
        return self.engine if isinstance(self.engine, TrainingEngine | ScoringEngine) else None

    @property
    def dp_size(self) -> int:
        """Data-parallel size: parts that samples are divided into, one for each rank or for as many neighbouring ranks
        as share sequences."""
        engine = self.model_engine
        return self.ranks if engine is None else self.ranks // engine.sequence_parallel

    @property
    def dp_size_text(self) -> str:
        """The data-parallel size in terms of the settings that it follows from."""
        engine = self.model_engine
        divided = (
            f" ÷ {self.section}.engine.sequence_parallel ({engine.sequence_parallel})"
            if engine is not None and engine.sequence_parallel > 1
            else ""
        )
        return f"placement.{self.placed_as}.ranks ({self.ranks}){divided}"

    def check_sequence_parallel(self) -> None:
        """Raise ValueError when some ranks would be left without neighbours to share sequences with."""
        engine = self.model_engine
        if engine is not None and self.ranks % engine.sequence_parallel:
            raise ValueError(
                f"{self.section}.engine.sequence_parallel ({engine.sequence_parallel}) does not divide "
                f"placement.{self.placed_as}.ranks ({self.ranks})"
            )


def needs_by_phase(roles: Iterable[RoleSpec]) -> dict[str, dict[str, Level]]:
    """For each phase, the roles with bundles that work in it, as `placement` names them, and how much of them."""
    needs: dict[str, dict[str, Level]] = {}
    for role in roles:
        if role.placement is not None:
            for phase, level in role.needs.items():
                needs.setdefault(phase, {})[role.placed_as] = level
    return needs
