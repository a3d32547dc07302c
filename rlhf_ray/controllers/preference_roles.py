"""The roles of a preference job, from its config."""

from dataclasses import dataclass
from typing import Any

from rlhf_ray.actors.devices import Devices
from rlhf_ray.actors.preference import PreferenceGroup, PreferenceWorker
from rlhf_ray.actors.reference import ReferenceGroup, ReferenceWorker
from rlhf_ray.actors.worker import RankGroup, join_collectives_of
from rlhf_ray.config.jobs import PreferenceJob
from rlhf_ray.controllers.roles import Actors, load_models


@dataclass(frozen=True)
class PreferenceRoles:
    """Policy and reference; None where no reference model is needed."""

    policy: PreferenceGroup
    reference: ReferenceGroup | None
    devices: Devices


def start_preference_roles(
    config: PreferenceJob, total_steps: int, actors: Actors, *, with_reference: bool
) -> PreferenceRoles:
    """Start all actors of the job with their models."""
    policy = actors.ranks(config.role("policy"), PreferenceWorker, PreferenceGroup, config)
    loads = {"policy": lambda: [policy.load_model(config.policy, config.algorithm, total_steps)]}
    started: list[RankGroup[Any]] = [policy]
    reference = None
    if with_reference:
        role, trusted = config.role("reference"), config.policy.trust_remote_code
        own = actors.ranks(role, ReferenceWorker, ReferenceGroup, config)
        assert role.model is not None
        model = role.model.path
        loads["reference"] = lambda: [own.load_model(model, config.reference.engine, 1.0, trusted)]
        reference = own
        started.append(own)
    devices = Devices(config, {"policy": [policy], "reference": started[1:]})
    join_collectives_of(started, config.run.timeouts)
    load_models(loads, devices, config.run.timeouts)
    return PreferenceRoles(policy, reference, devices)
