"""Where a step's samples come from: scored, with all that policy and critic train on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from rlhf_ray.actors.group import Calls
from rlhf_ray.actors.reward import ScorePart
from rlhf_ray.actors.shards import GeneratedShard, ScoredColumns, ShardFacts
from rlhf_ray.actors.training_shards import TrainingShardReport
from rlhf_ray.actors.waiting import wait_all
from rlhf_ray.algorithms.estimators import SampleInputs, groups_of, spread_fraction
from rlhf_ray.algorithms.moments import Moments
from rlhf_ray.algorithms.scores import ScoreShaper
from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.plugs import imported
from rlhf_ray.config.run import Limit
from rlhf_ray.controllers.inputs import PPOInputs
from rlhf_ray.controllers.ppo_roles import PPORoles, RewardPart
from rlhf_ray.controllers.step_record import StepRecord
from rlhf_ray.data.columns import ColumnPart
from rlhf_ray.data.cursor import PromptCursor
from rlhf_ray.data.requests import PromptRequest, cut_evenly, cut_into_shards, requests_for
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.data.trajectory import Floats
from rlhf_ray.rewards.combine import combine
from rlhf_ray.telemetry.trace import SpanRecorder


@dataclass(frozen=True)
class Experience:
    """One step's samples, ready to train on; numbers per sample are in the order of the generated shards.

    Attributes:
        facts: of each generated shard.
        shards: references to each `TrainingShard`, of some generated shards in a row.
        reports: of each of them.
        parts: unweighted scores by each part of the reward, `[samples]`.
        scores: their weighted sum, before shaping, `[samples]`.
        advantages: of whole samples, float32 `[samples]`; None where the shards have a column of them.
        moments: of the advantages of all tokens that are trained on.
        spread: share of the groups whose samples differ in return; None where no groups are compared.
    """

    facts: list[ShardFacts]
    shards: list[ray.ObjectRef]
    reports: list[TrainingShardReport]
    parts: dict[str, Floats]
    scores: Floats
    advantages: Floats | None
    moments: Moments
    spread: float | None

    @property
    def kl(self) -> Floats:
        """KL to the reference per response in nats, `[samples]`."""
        return np.concatenate([report.kl for report in self.reports])

    @property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """Tokens of each prompt, `[samples]`."""
        return np.concatenate([facts.prompt_lengths for facts in self.facts])

    @property
    def response_lengths(self) -> NDArray[np.int64]:
        """Tokens of each response, `[samples]`."""
        return np.concatenate([facts.response_lengths for facts in self.facts])

    @property
    def action_lengths(self) -> NDArray[np.int64]:
        """Tokens of each response that the policy chose itself, `[samples]`."""
        return np.concatenate([facts.action_lengths for facts in self.facts])


class ExperienceSource(Protocol):
    """Gives each step its samples, and goes on exactly from its state."""

    def next_batch(self, record: StepRecord, version: int) -> Experience:
        """The samples of the next step.

        Args:
            record: of the step.
            version: of the newest weights.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""


@dataclass(frozen=True)
class _Scoring:
    """A shard whose scores and columns are being computed."""

    shard: GeneratedShard
    rewards: dict[str, Calls[ScorePart]]
    old_logprobs: Calls[ColumnPart]
    reference_logprobs: Calls[ColumnPart]
    values: Calls[ColumnPart] | None


class SynchronousSource:
    """Generates a step's samples with the newest weights, and scores them."""

    def __init__(self, config: PPOJob, inputs: PPOInputs, roles: PPORoles) -> None:
        algorithm = config.algorithm
        self._config, self._prompts, self._roles = config, inputs.prompts, roles
        self._limits = config.run.timeouts
        self._cursor = PromptCursor(len(inputs.prompts), derive_seed(config.seed, "prompts"), config.data.shuffle)
        self._shaper = ScoreShaper(
            normalize=algorithm.normalise_scores,
            score_clip=algorithm.score_clip,
            truncation_penalty=algorithm.truncation_penalty,
        )

    def next_batch(self, record: StepRecord, version: int) -> Experience:
        """Generate and score."""
        data = self._config.data
        tickets = self._cursor.take(data.prompts_per_step)
        requests = requests_for(self._prompts, tickets, data.samples_per_prompt, self._config.seed)
        return self._score(self._generate(requests, record, version), record)

    def state_dict(self) -> dict[str, Any]:
        """Where the cursor stands, and the running moments of scores."""
        return {"cursor": self._cursor.state_dict(), "scores": self._shaper.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._cursor.load_state_dict(state["cursor"])
        self._shaper.load_state_dict(state["scores"])

    def _generate(
        self, requests: Sequence[PromptRequest], record: StepRecord, version: int
    ) -> Iterator[GeneratedShard]:
        shards = cut_into_shards(requests, self._config.rollout.shard_samples)
        wake_engines(self._roles, record.recorder, version, self._limits.sync)
        with record.timing("generate"):
            yield from self._roles.rollout.generate(shards, version)

    def _score(self, generated: Iterator[GeneratedShard], record: StepRecord) -> Experience:
        """Scoring of a shard starts when it is complete, while others still generate on devices of their own."""
        if self._roles.devices.shares("rollout"):
            generated = iter(list(generated))
        self._roles.devices.enter("score")
        scoring = [self._start_scoring(shard, record) for shard in generated]
        scoring.sort(key=lambda each: each.shard.number)
        with record.span("score"):
            parts = {
                part.name: collect_scores([(s.shard, s.rewards[part.name]) for s in scoring], self._limits.score)
                for part in self._roles.rewards
            }
            scores = combine(parts, {part.name: part.weight for part in self._roles.rewards})
            facts = [each.shard.facts for each in scoring]
            truncated = np.concatenate([each.truncated for each in facts])
            shaped = self._shaper.shape(torch.from_numpy(scores), torch.from_numpy(truncated)).numpy()
            shards, reports = self._training_shards(scoring, shaped, record.kl_coef)
        record.scored()
        advantages, moments, spread = self._advantages(shaped, record.kl_coef, facts, reports)
        return Experience(facts, shards, reports, parts, scores, advantages, moments, spread)

    def _start_scoring(self, shard: GeneratedShard, record: StepRecord) -> _Scoring:
        record.scoring_started()
        roles = self._roles
        return _Scoring(
            shard,
            rewards=start_rewards(roles.rewards, shard),
            old_logprobs=roles.policy.logprobs(shard),
            reference_logprobs=roles.reference_logprobs(shard),
            values=None if roles.critic is None else roles.critic.values(shard),
        )

    def _training_shards(
        self, scoring: list[_Scoring], scores: Floats, kl_coef: float
    ) -> tuple[list[ray.ObjectRef], list[TrainingShardReport]]:
        """Made by the critic's ranks where there is a critic, else by the policy's. Each makes one, since every rank
        that trains fetches all of them."""
        makers = self._roles.policy if self._roles.critic is None else self._roles.critic
        shards, reports, start = [], [], 0
        for rank, some in enumerate(cut_evenly(scoring, min(len(scoring), len(makers)))):
            samples = sum(len(each.shard.facts.uids) for each in some)
            values = [each.values.refs for each in some if each.values is not None]
            scored = ScoredColumns(
                trajectories=[each.shard.trajectories for each in some],
                old_logprobs=[each.old_logprobs.refs for each in some],
                reference_logprobs=[each.reference_logprobs.refs for each in some],
                values=values or None,
            )
            shard, report = makers.make_training_shard(rank, scored, scores[start : start + samples], kl_coef)
            shards.append(shard)
            reports.append(report)
            start += samples
        limit = self._limits.score
        return shards, wait_all(reports, limit.seconds, f"{makers.role}: advantages", limit.setting)

    def _advantages(
        self, scores: Floats, kl_coef: float, facts: list[ShardFacts], reports: list[TrainingShardReport]
    ) -> tuple[Floats | None, Moments, float | None]:
        """Those of whole samples, where the algorithm has such; the moments of those of all tokens; groups' spread."""
        estimator = self._config.algorithm.estimator
        if estimator.per_token:
            moments = Moments()
            for report in reports:
                assert report.advantages is not None
                moments = moments.merge(report.advantages)
            return None, moments, None
        penalty = np.concatenate([report.penalty for report in reports])
        groups = groups_of([uid for each in facts for uid in each.uids])
        inputs = SampleInputs(torch.from_numpy(scores) - kl_coef * torch.from_numpy(penalty), groups)
        advantages = imported(estimator.function)(inputs)
        counts = torch.from_numpy(np.concatenate([each.action_lengths for each in facts]))
        spread = spread_fraction(inputs) if estimator.groups else None
        return advantages.float().numpy(), Moments.weighted(advantages, counts), spread


def start_rewards(parts: Sequence[RewardPart], shard: GeneratedShard) -> dict[str, Calls[ScorePart]]:
    """Start all parts of the reward on a shard."""
    return {part.name: part.score(shard) for part in parts}


def collect_scores(scored: Sequence[tuple[GeneratedShard, Calls[ScorePart]]], limit: Limit) -> Floats:
    """Scores by one part of the reward for all samples of some shards, in their order."""
    columns = []
    for shard, calls in scored:
        scores = np.full(len(shard.facts.uids), np.nan, np.float32)
        for found in calls.wait(limit):
            scores[list(found.samples)] = found.scores
        columns.append(scores)
    return np.concatenate(columns)


def send_weights(roles: PPORoles, version: int, limit: Limit) -> None:
    """Give the engines the policy's weights under the name `version`."""
    roles.devices.enter("sync")
    roles.policy.send_weights(version).wait(limit)
    roles.devices.received("sync")


def wake_engines(roles: PPORoles, recorder: SpanRecorder, version: int, limit: Limit) -> None:
    """Bring the engines to their devices, with weights; they lose them to whoever needed the devices since."""
    if roles.devices.lacks_weights("rollout"):
        with recorder.span("weight_sync"):
            send_weights(roles, version, limit)
    roles.devices.enter("generate")
