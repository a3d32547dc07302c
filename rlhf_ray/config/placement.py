"""Where actors sit and what each reserves."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_ray.config.base import (
    MOST_PROCESSES,
    NonNegativeFloat,
    PositiveFloat,
    ProcessCount,
    Seconds,
    Section,
)

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
Host = Literal["policy", "critic", "reference", "reward"]

# What Ray takes as a label selector: a value, several, or the opposite of either.
_WORD = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_SELECTOR = re.compile(rf"!?(?:in\({_WORD}(?:, ?{_WORD})*\)|{_WORD})")

DEFAULT_THREADS = "RLHF_RAY_DEFAULT_THREADS"
"""Environment variable of a rank whose `threads` nobody chose."""

_OWN_KEYS = {"CPU": "cpus", "GPU": "gpus"}

# What places a role, and so has no effect on one that sits with another.
_PLACING = ("cpus", "gpus", "resources", "labels", "nodes", "strategy", "nodes_per_engine")


class _RankPlacement(Section):
    """What one rank, or one worker of an engine, reserves, and on which nodes."""

    cpus: NonNegativeFloat = 1.0
    """Ray CPUs that one rank, or one worker of an engine, reserves."""
    gpus: NonNegativeFloat = 0.0
    """GPUs that one rank reserves."""
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Custom Ray resources that one rank, or one worker of an engine, reserves."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels that its nodes must have, each with `value`, `!value`, `in(a, b)` or `!in(a, b)`."""
    nodes: ProcessCount | None = None
    """Nodes over which the ranks or engines are spread, as many on each; by default `strategy` alone decides."""
    strategy: Strategy = "PACK"
    """Nodes that are taken: as few as possible (`PACK`), as many as possible (`SPREAD`), one (`STRICT_PACK`), or one
    for each rank or engine (`STRICT_SPREAD`)."""
    threads: ProcessCount | None = None
    """Threads that one rank or worker computes with on CPU; by default `cpus`, at least 1; and for optimizer
    steps of a rank on a GPU with `offload_optimizer`, its part of the machine's cores, by its GPUs."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of these processes."""
    colocate: Host | None = None
    """Sit in the bundles of this role, rank by rank (an engine in those of `tensor_parallel` ranks), instead of in own
    ones."""

    @model_validator(mode="after")
    def _says_where(self) -> Self:
        for name, selector in self.labels.items():
            if not _SELECTOR.fullmatch(selector):
                raise ValueError(
                    f".labels.{name} is {selector!r}, which is none of: value, !value, in(a, b), !in(a, b)"
                )
        for name in self.resources:
            if name in _OWN_KEYS:
                raise ValueError(f".resources names {name}, which .{_OWN_KEYS[name]} sets")
        if self.nodes is not None and self.strategy != "PACK":
            raise ValueError(f".strategy is {self.strategy!r}, but .nodes ({self.nodes}) says already how they spread")
        return self


class RolePlacement(_RankPlacement):
    """Ranks of one role."""

    ranks: ProcessCount | None = None
    """Processes of this role. By default 1, or as many as the role it is colocated with."""

    @model_validator(mode="after")
    def _one_gpu_a_rank(self) -> Self:
        if self.gpus > 1:
            raise ValueError(f".gpus is {self.gpus:g}, but a rank drives one device: raise .ranks instead")
        ranks = self.ranks or 1
        spread = self.strategy == "STRICT_SPREAD" or self.nodes == ranks
        if 0 < self.gpus <= 0.5 and ranks > 1 and not spread:
            raise ValueError(
                f".gpus is {self.gpus:g} and .ranks is {ranks}: two ranks of one role would share a GPU, which NCCL "
                "refuses. Set .gpus to 1, or .ranks to 1, or .strategy to STRICT_SPREAD, which gives each its own node"
            )
        if self.nodes is not None and ranks % self.nodes:
            raise ValueError(f".ranks ({ranks}) can't be spread equally over .nodes ({self.nodes})")
        return self


class RolloutPlacement(_RankPlacement):
    """Rollout engines."""

    engines: ProcessCount = 1
    """vLLM engines, each with a full copy of the policy."""
    tensor_parallel: ProcessCount = 1
    """Workers over which one engine's weights are split."""
    nodes_per_engine: ProcessCount = 1
    """Nodes that one engine's workers may be divided among; by default they share one. More than one wants a fast
    network between them."""
    gpus: Literal[0, 1] = 0
    """GPUs that one worker reserves."""

    @model_validator(mode="after")
    def _engines_on_nodes(self) -> Self:
        if self.workers > MOST_PROCESSES:
            raise ValueError(
                f".engines ({self.engines}) x .tensor_parallel ({self.tensor_parallel}) is more than the "
                f"{MOST_PROCESSES:,} processes that a role may have"
            )
        if self.tensor_parallel % self.nodes_per_engine:
            raise ValueError(
                f".tensor_parallel ({self.tensor_parallel}) can't be divided into .nodes_per_engine "
                f"({self.nodes_per_engine})"
            )
        if self.nodes is not None and self.engines * self.nodes_per_engine % self.nodes:
            raise ValueError(
                f".engines ({self.engines}) x .nodes_per_engine ({self.nodes_per_engine}) can't be spread equally over "
                f".nodes ({self.nodes})"
            )
        return self

    @property
    def workers_per_node(self) -> int:
        """Of one engine."""
        return self.tensor_parallel // self.nodes_per_engine

    @property
    def workers(self) -> int:
        """Of all engines together."""
        return self.engines * self.tensor_parallel


class JobPlacement(Section):
    """What the placement of every job has."""

    placement_timeout_s: Seconds = 60.0
    """Seconds that the roles may wait for their places in the cluster."""

    @model_validator(mode="after")
    def _colocated_roles_fit(self) -> Self:
        roles = [name for name in type(self).model_fields if isinstance(getattr(self, name), _RankPlacement)]
        for guest in roles:
            host = self.section(guest).colocate
            if host is not None and (host not in roles or len(roles) == 1):
                kind = "other" if len(roles) == 1 else "such"
                raise ValueError(f".{guest}.colocate is {host!r}, but this job has no {kind} role")
            _check_colocated(self, guest)
        return self

    def section(self, role: str) -> RolePlacement | RolloutPlacement:
        """The section of a role."""
        found = getattr(self, role)
        assert isinstance(found, RolePlacement | RolloutPlacement)
        return found

    def host_of(self, role: str) -> RolePlacement | RolloutPlacement:
        """The section that places a role: its own, or that of the role it sits with."""
        own = self.section(role)
        return own if own.colocate is None else self.section(own.colocate)

    def ranks_of(self, role: str) -> int:
        """Ranks of a role, colocated or not."""
        host = self.host_of(role)
        assert isinstance(host, RolePlacement)
        return host.ranks or 1

    def gpus_of(self, role: str) -> float:
        """GPUs of the bundle that a rank of a role, or a worker of an engine, sits on."""
        return self.host_of(role).gpus

    @property
    def leaves_idle(self) -> bool:
        """Whether roles that share devices leave them to each other."""
        return False


class _SharedPlacement(JobPlacement):
    offload_idle: bool = False
    """Roles that share places leave their devices while another needs them: weights and optimizer state go to host
    memory, engines drop their weights and KV cache."""

    @property
    def leaves_idle(self) -> bool:
        """As `offload_idle` says."""
        return self.offload_idle


class PPOPlacement(_SharedPlacement):
    """All roles of a PPO job."""

    policy: RolePlacement = RolePlacement()
    """Policy ranks."""
    critic: RolePlacement = RolePlacement()
    """Critic ranks."""
    reference: RolePlacement = RolePlacement(colocate="policy")
    """Reference ranks."""
    reward: RolePlacement = RolePlacement(colocate="critic")
    """Ranks of each reward model."""
    rollout: RolloutPlacement = RolloutPlacement()
    """Rollout engines."""


class PreferencePlacement(_SharedPlacement):
    """The roles of a preference job."""

    policy: RolePlacement = RolePlacement()
    """Policy ranks."""
    reference: RolePlacement = RolePlacement(colocate="policy")
    """Reference ranks."""


class RewardModelPlacement(JobPlacement):
    """The role of a reward-model job."""

    reward: RolePlacement = RolePlacement()
    """Ranks that train the reward model."""


class SFTPlacement(JobPlacement):
    """The role of a fine-tuning job."""

    policy: RolePlacement = RolePlacement()
    """Ranks that train the language model."""


def _check_colocated(placement: JobPlacement, guest: str) -> None:
    """A role that sits with another has as many ranks, and no place of its own."""
    role = placement.section(guest)
    if role.colocate is None:
        return
    host = placement.section(role.colocate)
    assert isinstance(host, RolePlacement)
    if role.colocate == guest or host.colocate is not None:
        raise ValueError(f".{guest}.colocate: {role.colocate!r} must name a role that has its own place")
    for key in (key for key in _PLACING if key in type(role).model_fields):
        if getattr(role, key) != type(role).model_fields[key].get_default(call_default_factory=True):
            raise ValueError(
                f".{guest}.{key} has no effect beside .{guest}.colocate: it sits in .{role.colocate}'s place"
            )
    ranks = host.ranks or 1
    if isinstance(role, RolloutPlacement) and role.workers != ranks:
        raise ValueError(
            f".{guest}.engines ({role.engines}) x .{guest}.tensor_parallel ({role.tensor_parallel}) differs from "
            f".{role.colocate}.ranks ({ranks}), but .{guest}.colocate puts each worker on the place of one rank"
        )
    if isinstance(role, RolloutPlacement) and role.tensor_parallel > 1:
        on_one_node = {"STRICT_SPREAD": 1}.get(host.strategy, ranks // (host.nodes or 1))
        if on_one_node % role.tensor_parallel:
            raise ValueError(
                f".{guest}.tensor_parallel ({role.tensor_parallel}) does not divide the ranks that "
                f".{role.colocate} has on a node ({on_one_node}): one engine's workers share a node"
            )
    if isinstance(role, RolePlacement) and role.ranks not in (None, ranks):
        raise ValueError(
            f".{guest}.ranks ({role.ranks}) differs from .{role.colocate}.ranks ({ranks}), but "
            f".{guest}.colocate puts it on the same bundles"
        )


class Cluster(Section):
    """The Ray cluster the job runs on."""

    address: str | None = None
    """Cluster to join; `auto` is the one that runs on this machine, `local` a new one that ends with the run. None
    takes `RAY_ADDRESS`, which Ray jobs have, else `local`."""
    cpus: Annotated[int, Field(ge=0, le=MOST_PROCESSES)] | None = None
    """CPUs that a local cluster offers; by default this machine's."""
    preflight: bool = True
    """Look at every node before a model is loaded: libraries, models, disks, network. `rlhf-ray preflight` does only
    that."""
    autoscaling: bool = False
    """Nodes come when they are asked for: ask for those that are missing, and wait `placement.placement_timeout_s`."""
