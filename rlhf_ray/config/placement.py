"""Where actors sit and what each reserves."""

from typing import Literal

from pydantic import Field, model_validator

from rlhf_ray.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class RolePlacement(Section):
    """Ranks of one role."""

    ranks: PositiveInt | None = None
    """Processes of this role, each a data-parallel rank. By default 1, or as many as the role it is colocated with."""
    cpus: NonNegativeFloat = 1.0
    """Ray CPUs that one rank reserves."""
    gpus: NonNegativeFloat = 0.0
    """GPUs that one rank reserves."""
    threads: PositiveInt | None = None
    """Threads that one rank computes with on CPU; by default `cpus`, at least 1."""
    colocate: Literal["policy", "critic"] | None = None
    """Sit on the bundles of this role, rank by rank, instead of on own ones."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy of this role's bundles."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of these processes."""

    @model_validator(mode="after")
    def _one_gpu_a_rank(self) -> "RolePlacement":
        if self.gpus > 1:
            raise ValueError(f".gpus is {self.gpus:g}, but a rank drives one device: raise .ranks instead")
        return self


class RolloutPlacement(Section):
    """Rollout engines."""

    engines: PositiveInt = 1
    """vLLM engines, each with a full copy of the policy."""
    tensor_parallel: PositiveInt = 1
    """Workers over which one engine's weights are split."""
    cpus: NonNegativeFloat = 1.0
    """Ray CPUs that one engine reserves for each of its workers."""
    gpus: Literal[0, 1] = 0
    """GPUs that one worker reserves."""
    threads: PositiveInt | None = None
    """Threads that one worker computes with on CPU; by default `cpus`, at least 1."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy of the engines' bundles."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of these processes."""


class _Timeouts(Section):
    placement_timeout_s: PositiveFloat = 60.0
    """Seconds that a role may wait for its place in the cluster."""


class PPOPlacement(_Timeouts):
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

    @model_validator(mode="after")
    def _colocated_ranks_match(self) -> "PPOPlacement":
        for guest in ("policy", "critic", "reference", "reward"):
            _check_colocated(self, guest)
        return self

    def ranks_of(self, role: Literal["policy", "critic", "reference", "reward"]) -> int:
        """Ranks of a role, colocated or not."""
        return self._host_of(role).ranks or 1

    def gpus_of(self, role: Literal["policy", "critic", "reference", "reward"]) -> float:
        """GPUs of the bundle that a rank of a role sits on."""
        return self._host_of(role).gpus

    def _host_of(self, role: Literal["policy", "critic", "reference", "reward"]) -> RolePlacement:
        placement: RolePlacement = getattr(self, role)
        return placement if placement.colocate is None else getattr(self, placement.colocate)


class PreferencePlacement(_Timeouts):
    """The roles of a preference job."""

    policy: RolePlacement = RolePlacement()
    """Policy ranks."""
    reference: RolePlacement = RolePlacement(colocate="policy")
    """Reference ranks."""

    @model_validator(mode="after")
    def _colocated_ranks_match(self) -> "PreferencePlacement":
        if "critic" in (self.policy.colocate, self.reference.colocate):
            raise ValueError(".reference.colocate is 'critic', but this job has no such role")
        for guest in ("policy", "reference"):
            _check_colocated(self, guest)
        return self

    @property
    def reference_ranks(self) -> int:
        """Ranks of the reference, colocated or not."""
        return (self.policy if self.reference.colocate else self.reference).ranks or 1


class RewardModelPlacement(_Timeouts):
    """The role of a reward-model job."""

    reward: RolePlacement = RolePlacement()
    """Ranks that train the reward model."""

    @model_validator(mode="after")
    def _sits_alone(self) -> "RewardModelPlacement":
        _check_alone("reward", self.reward)
        return self


class SFTPlacement(_Timeouts):
    """The role of a fine-tuning job."""

    policy: RolePlacement = RolePlacement()
    """Ranks that train the language model."""

    @model_validator(mode="after")
    def _sits_alone(self) -> "SFTPlacement":
        _check_alone("policy", self.policy)
        return self


def _check_colocated(placement: PPOPlacement | PreferencePlacement, guest: str) -> None:
    """A role that sits with another has as many ranks, and no place of its own."""
    role: RolePlacement = getattr(placement, guest)
    if role.colocate is None:
        return
    host: RolePlacement = getattr(placement, role.colocate)
    if role.colocate == guest or host.colocate is not None:
        raise ValueError(f".{guest}.colocate: {role.colocate!r} must name a role that has its own place")
    for key in ("cpus", "gpus", "strategy"):
        if getattr(role, key) != RolePlacement.model_fields[key].default:
            raise ValueError(
                f".{guest}.{key} has no effect beside .{guest}.colocate: it sits in .{role.colocate}'s place"
            )
    if role.ranks is not None and role.ranks != (host.ranks or 1):
        raise ValueError(
            f".{guest}.ranks ({role.ranks}) differs from .{role.colocate}.ranks ({host.ranks or 1}), but "
            f".{guest}.colocate puts it on the same bundles"
        )


def _check_alone(role: str, placement: RolePlacement) -> None:
    if placement.colocate is not None:
        raise ValueError(f".{role}.colocate is {placement.colocate!r}, but this job has no other role")


class Cluster(Section):
    """The Ray cluster the job runs on."""

    address: str | None = None
    """Cluster to join; `auto` is the one that runs on this machine. None takes `RAY_ADDRESS`, which Ray jobs have, else
    starts a local cluster that ends with the run."""
    cpus: NonNegativeInt | None = None
    """CPUs that a local cluster offers; by default this machine's."""
