"""Proximal policy optimisation from human feedback (Ziegler et al. 2019, Ouyang et al. 2022), one step on one page."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import ray
import torch

from rlhf_ray.actors.columns import PortionReport
from rlhf_ray.actors.rollout import GeneratedShard, ShardFacts
from rlhf_ray.actors.trained import NonFiniteLossError, UpdateReport
from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.algorithms.kl import KLController
from rlhf_ray.algorithms.moments import Moments
from rlhf_ray.algorithms.scores import ScoreShaper
from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.controllers.inputs import PPOInputs
from rlhf_ray.controllers.ppo_report import PPOReport, StepRecord
from rlhf_ray.controllers.ppo_roles import PPORoles
from rlhf_ray.controllers.run_folder import Checkpointing, RunFolder
from rlhf_ray.data.cursor import PromptCursor
from rlhf_ray.data.minibatches import OptimizerStep, plan_update
from rlhf_ray.data.requests import PromptRequest, cut_evenly, cut_into_shards, requests_for
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.data.trajectory import Floats
from rlhf_ray.rewards.combine import combine
from rlhf_ray.telemetry.samples import SampleRow


@dataclass(frozen=True)
class RewardedShard:
    """A generated shard and the references to its scores, by part of the reward."""

    generated: GeneratedShard
    rewards: dict[str, list[ray.ObjectRef]]


@dataclass(frozen=True)
class ScoredShard(RewardedShard):
    """A shard with the references to all that roles make of it."""

    old_logprobs: list[ray.ObjectRef]
    reference_logprobs: list[ray.ObjectRef]
    values: list[ray.ObjectRef]


@dataclass(frozen=True)
class Batch:
    """One step's samples, ready to train on; numbers per sample are in shard order.

    Attributes:
        facts: of each shard.
        portions: references to trajectories with their training columns, of some shards in a row each.
        reports: of each portion.
        parts: unweighted scores by each part of the reward, `[samples]`.
        scores: their weighted sum, before shaping, `[samples]`.
    """

    facts: list[ShardFacts]
    portions: list[ray.ObjectRef]
    reports: list[PortionReport]
    parts: dict[str, Floats]
    scores: Floats


class PPOController:
    """Runs the algorithm over roles that live elsewhere; holds references to samples and numbers about them."""

    def __init__(
        self, config: PPOJob, inputs: PPOInputs, roles: PPORoles, folder: RunFolder, checkpointing: Checkpointing
    ) -> None:
        algorithm = config.algorithm
        self.config, self.inputs, self.roles, self.folder = config, inputs, roles, folder
        self.checkpointing, self.devices = checkpointing, roles.devices
        self.report = PPOReport(config, inputs.tokenizer, folder.path)
        self.step = 0
        self.version = 0
        self.cursor = PromptCursor(len(inputs.prompts), derive_seed(config.seed, "prompts"), config.data.shuffle)
        self.kl = KLController(
            algorithm.kl.coef, algorithm.kl.target, algorithm.kl.horizon if algorithm.kl.target else None
        )
        self.scores = ScoreShaper(
            normalize=algorithm.normalise_scores,
            score_clip=algorithm.score_clip,
            truncation_penalty=algorithm.truncation_penalty,
        )

    def train(self) -> None:
        """All steps from where the run stands."""
        self._resume()
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
        """One PPO step."""
        record = StepRecord(step, self.folder.recorder, kl_coef=self.kl.coef)
        tickets = self.cursor.take(self.config.data.prompts_per_step)
        requests = requests_for(self.inputs.prompts, tickets, self.config.data.samples_per_prompt, self.config.seed)

        batch = self._score(self._generate(requests, record), record)
        with self.folder.recorder.span("update", step):
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
        self.kl.update(float(np.concatenate([report.kl for report in batch.reports]).mean()), len(batch.scores))

        self.step = step
        self._finish(step, record, batch, policy, critic)

    def _generate(self, requests: list[PromptRequest], record: StepRecord) -> Iterator[GeneratedShard]:
        shards = cut_into_shards(requests, self.config.rollout.shard_samples)
        self._wake_engines()
        with record.timing("generate"):
            yield from self.roles.rollout.generate(shards, self.version)

    def _score(self, generated: Iterator[GeneratedShard], record: StepRecord) -> Batch:
        """Scoring of a shard starts when it is complete, while others still generate on devices of their own."""
        if self.devices.shares("rollout"):
            generated = iter(list(generated))
        self.devices.enter("score")
        scored = [self._start_scoring(shard, record) for shard in generated]
        scored.sort(key=lambda shard: shard.generated.number)
        with self.folder.recorder.span("score", record.step):
            parts = {part.name: self._collect(scored, part.name) for part in self.roles.rewards}
            scores = combine(parts, {part.name: part.weight for part in self.roles.rewards})
            truncated = np.concatenate([shard.generated.facts.truncated for shard in scored])
            shaped = self.scores.shape(torch.from_numpy(scores), torch.from_numpy(truncated)).numpy()
            portions, reports = self._advantages(scored, shaped)
        record.scored()
        return Batch([shard.generated.facts for shard in scored], portions, reports, parts, scores)

    def _start_scoring(self, shard: GeneratedShard, record: StepRecord) -> ScoredShard:
        record.scoring_started()
        return ScoredShard(
            shard,
            rewards=self._start_rewards(shard),
            old_logprobs=self.roles.policy.call_on("logprobs", shard),
            reference_logprobs=self.roles.reference_logprobs(shard),
            values=self.roles.critic.call_on("values", shard),
        )

    def _start_rewards(self, shard: GeneratedShard) -> dict[str, list[ray.ObjectRef]]:
        return {part.name: part.score(shard) for part in self.roles.rewards}

    def _advantages(self, scored: list[ScoredShard], shaped: Floats) -> tuple[list[ray.ObjectRef], list[PortionReport]]:
        """Each rank of the critic makes one portion, since every rank that trains fetches all portions."""
        portions, reports, start = [], [], 0
        for number, shards in enumerate(cut_evenly(scored, min(len(scored), len(self.roles.critic)))):
            samples = sum(len(shard.generated.facts.uids) for shard in shards)
            portion, report = self.roles.critic.call_one(
                number,
                "advantages",
                [shard.generated.trajectories for shard in shards],
                shaped[start : start + samples],
                self.kl.coef,
                [shard.old_logprobs for shard in shards],
                [shard.reference_logprobs for shard in shards],
                [shard.values for shard in shards],
                num_returns=2,
            )
            portions.append(portion)
            reports.append(report)
            start += samples
        return portions, self._wait(reports, "critic: advantages", "score_s")

    def _update(self, batch: Batch, step: int) -> tuple[list[UpdateReport], list[UpdateReport]]:
        """Critic and policy train at the same time, on devices that they share one after the other; the policy waits
        out the critic's warm-up."""
        prompt_lengths = np.concatenate([facts.prompt_lengths for facts in batch.facts])
        response_lengths = np.concatenate([facts.response_lengths for facts in batch.facts])
        starts = np.cumsum([0, *(len(report.kl) for report in batch.reports[:-1])]).tolist()
        algorithm, config = self.config.algorithm, self.config
        warming_up = step <= algorithm.critic_warmup_steps
        moments = Moments()
        for report in batch.reports:
            moments = moments.merge(report.advantages)
        arguments: dict[str, tuple[Any, ...]] = {"critic": ()}
        if not warming_up:
            arguments["policy"] = (moments if algorithm.whiten_advantages else None,)

        @cache  # planning takes longest here, and critic and policy often have the same plan
        def plan_for(shares: int, max_tokens: int) -> list[list[OptimizerStep]]:
            return plan_update(
                prompt_lengths,
                response_lengths,
                epochs=algorithm.epochs,
                optimizer_steps=algorithm.optimizer_steps,
                ranks=shares,
                max_tokens=max_tokens,
                seed=derive_seed(config.seed, "minibatches", step),
            )

        portions = ray.put(batch.portions)  # else every rank's call would carry all these references
        running: dict[str, list[ray.ObjectRef]] = {}
        for turn in self.devices.turns(arguments):
            self.devices.enter("update", turn)
            for role in turn:
                group = getattr(self.roles, role)
                plan = plan_for(group.shares, getattr(config, role).engine.micro_batch_tokens)
                per_rank = [(portions, starts, mine, *arguments[role]) for mine in plan]
                running[role] = group.call_each("update", per_rank)
            try:
                self._wait(
                    [ref for role in turn for ref in running[role]], f"update of {' and '.join(turn)}", "update_s"
                )
            except NonFiniteLossError as error:
                trajectories = [self._fetch(portion)[0] for portion in batch.portions]
                raise self.report.save_failure(step, trajectories, batch.parts, error) from error
        reports = {role: self._wait(refs, f"{role}: update", "update_s") for role, refs in running.items()}
        for role, found in reports.items():
            self._check_all_trained(role, found, algorithm.epochs * len(batch.scores))
        return reports.get("policy", []), reports["critic"]

    def _check_all_trained(self, role: str, reports: list[UpdateReport], expected: int) -> None:
        trained = sum(report.samples for report in reports)
        stopped_early = role == "policy" and self.config.algorithm.kl_early_stop is not None
        if trained != expected and not stopped_early:
            raise RuntimeError(f"{role} trained on {trained} samples where {expected} were due; this is a bug")

    def _finish(
        self, step: int, record: StepRecord, batch: Batch, policy: list[UpdateReport], critic: list[UpdateReport]
    ) -> None:
        metrics = self.report.metrics(record, batch.facts, batch.reports, batch.parts, batch.scores, policy, critic)
        spans = self.folder.collect_spans(self.roles.groups, self.config.run.timeouts.setup_s)
        metrics |= record.timings(spans)
        metrics["rollout/weight_version"] = float(self.version)
        if step % self.config.run.samples_every == 0 or step in (1, self.config.run.steps):
            self.folder.samples.append(step, self._first_samples(batch))
        self.folder.log_step(step, metrics)
        if self.folder.checkpoint_due(step, last=step == self.config.run.steps):
            self.checkpointing.commit(step, self._state(), metrics)
            if self.config.run.export and step < self.config.run.steps:
                self.checkpointing.export("policy", wait=False)

    def _collect(self, scored: Sequence[RewardedShard], part: str) -> Floats:
        """Scores of one part for all samples, in shard order."""
        columns = []
        for shard in scored:
            scores = np.full(len(shard.generated.facts.uids), np.nan, np.float32)
            for found in self._wait(shard.rewards[part], f"reward {part}: score", "score_s"):
                scores[list(found.samples)] = found.scores
            columns.append(scores)
        return np.concatenate(columns)

    def _showcase(self) -> list[SampleRow]:
        """Responses to the same few prompts with the same seeds, to compare those before and after training."""
        cursor = PromptCursor(len(self.inputs.prompts), seed=0, shuffle=False)
        tickets = cursor.take(min(self.config.run.samples_kept, len(self.inputs.prompts)))
        requests = requests_for(self.inputs.prompts, tickets, 1, derive_seed(self.config.seed, "showcase"))
        self._wake_engines()
        [shard] = self.roles.rollout.generate([requests], self.version)
        self.devices.enter("score", ["reward"])
        rewarded = RewardedShard(shard, self._start_rewards(shard))
        parts = {part.name: self._collect([rewarded], part.name) for part in self.roles.rewards}
        return self.report.sample_rows(self._fetch(shard.trajectories), parts, np.zeros(len(requests), np.float32))

    def _first_samples(self, batch: Batch) -> list[SampleRow]:
        kept = self.config.run.samples_kept
        rows: list[SampleRow] = []
        for portion, report in zip(batch.portions, batch.reports, strict=True):
            wanted = min(kept - len(rows), len(report.kl))
            if wanted == 0:
                break
            here = slice(len(rows), len(rows) + wanted)
            parts = {name: scores[here] for name, scores in batch.parts.items()}
            first = self._fetch(portion)[0].select(range(wanted))  # decoding a whole portion takes seconds
            rows += self.report.sample_rows(first, parts, report.kl[:wanted])
        return rows

    def _fetch(self, samples: ray.ObjectRef) -> Any:
        [fetched] = self._wait([samples], "samples to write down", "score_s")
        return fetched

    def _state(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "cursor": self.cursor.state_dict(),
            "kl": self.kl.state_dict(),
            "scores": self.scores.state_dict(),
            "before": [asdict(row) for row in self.report.before],
        }

    def _resume(self) -> None:
        checkpoint = self.folder.resumed
        if checkpoint is None:
            lora = self.config.policy.lora
            # Rounding to fewer bits gave the policy other weights than the engines have.
            if lora is not None and lora.base != "as_model":
                self._send_weights()
            return
        self.checkpointing.load(checkpoint)
        self.step, self.version = checkpoint.step, checkpoint.state["version"]
        self.cursor.load_state_dict(checkpoint.state["cursor"])
        self.kl.load_state_dict(checkpoint.state["kl"])
        self.scores.load_state_dict(checkpoint.state["scores"])
        self.report.before = [SampleRow(**row) for row in checkpoint.state["before"]]
        self._send_weights()

    def _send_weights(self) -> None:
        self.devices.enter("sync")
        self._run("policy", "send_weights", self.version, limit="sync_s")
        self.devices.received("sync")

    def _wake_engines(self) -> None:
        """Bring the engines to their devices, with weights; they lose them to whoever needed the devices since."""
        if self.devices.lacks_weights("rollout"):
            with self.folder.recorder.span("weight_sync"):
                self._send_weights()
        self.devices.enter("generate")

    def _run(self, role: str, method: str, *args: Any, limit: str) -> list[Any]:
        return self._wait(getattr(self.roles, role).call(method, *args), f"{role}: {method}", limit)

    def _wait(self, refs: list[ray.ObjectRef], what: str, limit: str) -> list[Any]:
        return wait_all(refs, getattr(self.config.run.timeouts, limit), what, f"run.timeouts.{limit}")
