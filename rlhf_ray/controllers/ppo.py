"""Policy-gradient learning from human feedback (Ziegler et al. 2019, Ouyang et al. 2022), one step on one page."""

from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import ray

from rlhf_ray.actors.group import Calls, wait_together
from rlhf_ray.actors.trained import NonFiniteLossError, UpdateReport
from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.algorithms.kl import KLController
from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.controllers.experience import (
    Experience,
    ExperienceSource,
    SynchronousSource,
    collect_scores,
    send_weights,
    start_rewards,
    wake_engines,
)
from rlhf_ray.controllers.inputs import PPOInputs
from rlhf_ray.controllers.ppo_report import PPOReport
from rlhf_ray.controllers.ppo_roles import PPORoles
from rlhf_ray.controllers.run_folder import Checkpointing, RunFolder
from rlhf_ray.controllers.step_record import StepRecord
from rlhf_ray.data.columns import TrainingShard
from rlhf_ray.data.cursor import PromptCursor
from rlhf_ray.data.minibatches import OptimizerStep, plan_update
from rlhf_ray.data.requests import requests_for
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.recovery.checkpoints import Checkpoint
from rlhf_ray.telemetry.samples import SampleRow


class PPOController:
    """Runs the algorithm over roles that live elsewhere; holds references to samples and numbers about them."""

    def __init__(
        self,
        config: PPOJob,
        inputs: PPOInputs,
        roles: PPORoles,
        folder: RunFolder,
        checkpointing: Checkpointing,
        source: ExperienceSource | None = None,
    ) -> None:
        kl = config.algorithm.kl
        self.config, self.inputs, self.roles, self.folder = config, inputs, roles, folder
        self.checkpointing, self.devices = checkpointing, roles.devices
        self.source = source or SynchronousSource(config, inputs, roles)
        self.report = PPOReport(config, inputs.tokenizer, folder.path)
        self.step = 0
        self.version = 0
        self.kl = KLController(kl.coef, kl.target, kl.horizon if kl.target else None)

    def train(self) -> None:
        """All steps from where the run stands."""
        self.restore(self.folder.resumed)
        self.folder.start_progress()
        if self.step == 0:
            with self.folder.recorder.span("showcase"):
                self.report.before = self._showcase()
        while self.step < self.config.run.steps:
            self.train_step(self.step + 1)
        with self.folder.recorder.span("showcase"):
            self.report.write_showcase(after=self._showcase())
        if self.config.run.export:
            self.checkpointing.export("policy", wait=True)

    def train_step(self, step: int) -> None:
        """One step."""
        record = StepRecord(step, self.folder.recorder, kl_coef=self.kl.coef)
        batch = self.source.next_batch(record, self.version)
        with record.span("update"):
            policy, critic = self._update(batch, step)
        if policy:
            self.version += 1
        # Before the sync: engines that share devices leave them for a checkpoint, and would lose what they just got.
        if self.folder.checkpoint_due(step, last=step == self.config.run.steps):
            with record.timing("checkpoint"):
                self.checkpointing.save(step)
        if policy or self.devices.lacks_weights("rollout"):
            with record.timing("weight_sync"):
                self._send_weights()
        self.kl.update(float(batch.kl.mean()), len(batch.scores))

        self.step = step
        self._finish(step, record, batch, policy, critic)

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Bring all roles and this controller to the state of a checkpoint; without one, to that before the first
        step."""
        if checkpoint is None:
            lora = self.config.policy.lora
            # Rounding to fewer bits gave the policy other weights than the engines have.
            if lora is not None and lora.base != "as_model":
                self._send_weights()
            return
        self.checkpointing.load(checkpoint)
        self.step, self.version = checkpoint.step, checkpoint.state["version"]
        self.source.load_state_dict(checkpoint.state["source"])
        self.kl.load_state_dict(checkpoint.state["kl"])
        self.report.before = [SampleRow(**row) for row in checkpoint.state["before"]]
        self._send_weights()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the controller."""
        return {
            "version": self.version,
            "source": self.source.state_dict(),
            "kl": self.kl.state_dict(),
            "before": [asdict(row) for row in self.report.before],
        }

    def _update(self, batch: Experience, step: int) -> tuple[list[UpdateReport], list[UpdateReport]]:
        """Policy and critic train at the same time, on devices that they share one after the other; the policy waits
        out the critic's warm-up."""
        algorithm, roles, limits = self.config.algorithm, self.roles, self.config.run.timeouts
        starts = np.cumsum([0, *(len(report.kl) for report in batch.reports[:-1])]).tolist()

        @cache  # planning takes longest here, and critic and policy often have the same plan
        def plan_for(dp_size: int, max_tokens: int) -> list[list[OptimizerStep]]:
            return plan_update(
                batch.prompt_lengths,
                batch.response_lengths,
                batch.action_lengths,
                epochs=algorithm.epochs,
                optimizer_steps=algorithm.optimizer_steps,
                dp_size=dp_size,
                max_tokens=max_tokens,
                seed=derive_seed(self.config.seed, "minibatches", step),
            )

        shards = ray.put(batch.shards)  # else every rank's call would carry all these references
        whitening = batch.moments if algorithm.whiten_advantages else None

        def update_policy() -> Calls[UpdateReport]:
            plans = plan_for(roles.policy.dp_size, self.config.policy.engine.micro_batch_tokens)
            return roles.policy.update(shards, starts, plans, batch.advantages, whitening)

        def update_critic() -> Calls[UpdateReport]:
            assert roles.critic is not None
            assert self.config.critic is not None
            plans = plan_for(roles.critic.dp_size, self.config.critic.engine.micro_batch_tokens)
            return roles.critic.update(shards, starts, plans)

        updates = {"critic": update_critic} if roles.critic is not None else {}
        if step > algorithm.critic_warmup_steps:
            updates["policy"] = update_policy
        running: dict[str, Calls[UpdateReport]] = {}
        for turn in self.devices.turns(updates):
            self.devices.enter("update", turn)
            running |= {role: updates[role]() for role in turn}
            try:
                wait_together([running[role] for role in turn], limits.update, f"update of {' and '.join(turn)}")
            except NonFiniteLossError as error:
                trajectories = [self._fetch(shard).batch for shard in batch.shards]
                raise self.report.save_failure(step, trajectories, batch.parts, error) from error
        reports = {role: calls.wait(limits.update) for role, calls in running.items()}
        for role, found in reports.items():
            self._check_all_trained(role, found, algorithm.epochs * len(batch.scores))
        return reports.get("policy", []), reports.get("critic", [])

    def _check_all_trained(self, role: str, reports: list[UpdateReport], expected: int) -> None:
        trained = sum(report.samples for report in reports)
        stopped_early = role == "policy" and self.config.algorithm.kl_early_stop is not None
        if trained != expected and not stopped_early:
            raise RuntimeError(f"{role} trained on {trained} samples where {expected} were due; this is a bug")

    def _finish(
        self, step: int, record: StepRecord, batch: Experience, policy: list[UpdateReport], critic: list[UpdateReport]
    ) -> None:
        metrics = self.report.metrics(record, batch, policy, critic)
        spans = self.folder.collect_spans(self.roles.groups, self.config.run.timeouts.setup)
        metrics |= record.timings(spans)
        metrics["rollout/weight_version"] = float(self.version)
        if step % self.config.run.samples_every == 0 or step in (1, self.config.run.steps):
            self.folder.samples.append(step, self._first_samples(batch))
        self.folder.log_step(step, metrics)
        if self.folder.checkpoint_due(step, last=step == self.config.run.steps):
            self.checkpointing.commit(step, self.state_dict(), metrics)
            if self.config.run.export and step < self.config.run.steps:
                self.checkpointing.export("policy", wait=False)

    def _showcase(self) -> list[SampleRow]:
        """Responses to the same few prompts with the same seeds, to compare those before and after training."""
        cursor = PromptCursor(len(self.inputs.prompts), seed=0, shuffle=False)
        tickets = cursor.take(min(self.config.run.samples_kept, len(self.inputs.prompts)))
        requests = requests_for(self.inputs.prompts, tickets, 1, derive_seed(self.config.seed, "showcase"))
        wake_engines(self.roles, self.folder.recorder, self.version, self.config.run.timeouts.sync)
        [shard] = self.roles.rollout.generate([requests], self.version)
        self.devices.enter("score", ["reward"])
        limit = self.config.run.timeouts.score
        scoring = start_rewards(self.roles.rewards, shard)
        parts = {name: collect_scores([(shard, calls)], limit) for name, calls in scoring.items()}
        return self.report.sample_rows(self._fetch(shard.trajectories), parts, np.zeros(len(requests), np.float32))

    def _first_samples(self, batch: Experience) -> list[SampleRow]:
        kept = self.config.run.samples_kept
        rows: list[SampleRow] = []
        for ref, report in zip(batch.shards, batch.reports, strict=True):
            wanted = min(kept - len(rows), len(report.kl))
            if wanted == 0:
                break
            here = slice(len(rows), len(rows) + wanted)
            parts = {name: scores[here] for name, scores in batch.parts.items()}
            shard: TrainingShard = self._fetch(ref)
            first = shard.batch.select(range(wanted))  # decoding a whole shard takes seconds
            rows += self.report.sample_rows(first, parts, report.kl[:wanted])
        return rows

    def _fetch(self, samples: ray.ObjectRef) -> Any:
        limit = self.config.run.timeouts.score
        [fetched] = wait_all([samples], limit.seconds, "samples to write down", limit.setting)
        return fetched

    def _send_weights(self) -> None:
        send_weights(self.roles, self.version, self.config.run.timeouts.sync)
