"""Offline preference learning: epochs over pairs or labels, with a reference model beside the policy."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.actors.group import ActorGroup
from rlhf_ray.actors.preference import PreferenceGroup, StepContext
from rlhf_ray.actors.shards import Refs
from rlhf_ray.actors.trained import UpdateReport
from rlhf_ray.algorithms.preference.unpaired import RewardShift
from rlhf_ray.config.jobs import PreferenceJob
from rlhf_ray.controllers.epochs import EpochController
from rlhf_ray.controllers.inputs import PreferenceInputs
from rlhf_ray.controllers.preference_roles import PreferenceRoles
from rlhf_ray.controllers.reference_columns import CachedReference, LiveReference, ReferenceCache
from rlhf_ray.controllers.row_sources import Split
from rlhf_ray.controllers.run_folder import Checkpointing, RunFolder
from rlhf_ray.telemetry.metrics import Metrics, sum_means


class PreferenceController(EpochController):
    """Runs the epochs; what a loss needs beside its rows is gathered here.

    Args:
        cache: of the reference's log-probs, None when they are computed for each step.
    """

    config: PreferenceJob
    group: PreferenceGroup

    def __init__(
        self,
        config: PreferenceJob,
        inputs: PreferenceInputs,
        roles: PreferenceRoles,
        cache: ReferenceCache | None,
        folder: RunFolder,
        checkpointing: Checkpointing,
    ) -> None:
        super().__init__(config, inputs, roles.policy, folder, checkpointing)
        self._devices, self._updated = roles.devices, roles.reference
        self._shift = RewardShift()
        self._others = {name: Split(f"{name}, mismatched", rows) for name, rows in inputs.mismatched.items()}
        splits = [split for split in (self.training, self.held_out, *self._others.values()) if split is not None]
        live = LiveReference.with_roles(config, roles)
        self._live = live if cache is None else None
        self._reference: LiveReference | CachedReference | None = live
        if cache is not None:
            self._devices.enter("score")
            self._reference = CachedReference(cache, live, splits)
            self._devices.enter("update")
            if roles.reference is not None:
                folder.unwatch(roles.reference)
                roles.reference.kill()  # its work is done

    @property
    def groups(self) -> list[ActorGroup[Any]]:
        """All roles."""
        return list(dict.fromkeys([self.group, *([] if self._live is None else [self._live.group])]))

    def context(self, split: Split, rows: NDArray[np.int64]) -> StepContext:
        """Log-probs of reference and policy that the losses of these rows take as given."""
        algorithm = self.config.algorithm
        # A reference whose log-probs are read from a cache has ended.
        self._devices.enter("score", None if self._live is not None else ["policy"])
        context = StepContext(
            reference=self._of_reference(split, rows),
            policy=self._of_policy(split, rows) if algorithm.couples_rows else (),
            mismatched=self._of_mismatched(split, rows) if algorithm.kto is not None else ((), ()),
            shift=self._shift.value,
        )
        self._devices.finish([*context.reference, *context.mismatched[1]], "log-probs of the reference")
        self._devices.enter("update")
        return context

    def after_step(self, step: int, reports: Sequence[UpdateReport]) -> Metrics:
        """Move BCO's running mean of rewards and TR-DPO's reference."""
        metrics: Metrics = {}
        if (bco := self.config.algorithm.bco) is not None:
            metrics["train/shift"] = self._shift.value
            ratios = sum_means([report.means for report in reports])
            wanted, unwanted = ratios["wanted_ratio"], ratios["unwanted_ratio"]
            self._shift.update(bco.beta * wanted.total, wanted.weight, bco.beta * unwanted.total, unwanted.weight)
        every = self.config.reference.update_every
        if self._updated is not None and every and step % every == 0:
            self._devices.enter("score")
            shared = self.group.share_weights().wait(self.config.run.timeouts.sync)
            self._updated.mix_weights(shared, self.config.reference.update_mix).wait(self.config.run.timeouts.sync)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the controller."""
        return super().state_dict() | {"shift": self._shift.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state)
        self._shift.load_state_dict(state["shift"])

    def _of_reference(self, split: Split, rows: NDArray[np.int64]) -> Refs:
        return () if self._reference is None else self._reference.of(split, rows)

    def _of_policy(self, split: Split, rows: NDArray[np.int64]) -> Refs:
        return self.group.answer_logprobs(self._plan(split, rows)).refs

    def _of_mismatched(self, split: Split, rows: NDArray[np.int64]) -> tuple[Refs, Refs]:
        others = self._others[split.name]
        return self._of_policy(others, rows), self._of_reference(others, rows)
