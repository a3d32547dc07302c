"""The parts of the reward: models in ranks, functions and services in workers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_ray.actors.columns import response_column
from rlhf_ray.actors.group import ActorGroup, Calls, on_all
from rlhf_ray.actors.shards import GeneratedShard
from rlhf_ray.actors.worker import RankGroup, Worker
from rlhf_ray.config.rewards import FunctionReward, HttpReward, ModelReward
from rlhf_ray.data.trajectory import Floats, TrajectoryBatch, offsets_of
from rlhf_ray.engines.training import DTYPES, ForwardEngine
from rlhf_ray.models.folder_checks import positions_of
from rlhf_ray.models.heads import load_scalar, load_tokenizer
from rlhf_ray.models.score_scale import scale_of
from rlhf_ray.rewards.errors import RewardError
from rlhf_ray.rewards.function import FunctionScorer
from rlhf_ray.rewards.http import HttpScorer
from rlhf_ray.rewards.text import decode_responses
from rlhf_ray.telemetry.trace import in_span


@dataclass(frozen=True)
class ScorePart:
    """What one rank scored of a shard.

    Attributes:
        samples: numbers of the samples within the shard.
        scores: float32 `[samples]`.
    """

    samples: tuple[int, ...]
    scores: Floats


class RewardModelWorker(Worker):
    """One rank of a reward model: the score is the scalar head's output at the last token."""

    @in_span("load model")
    def load_model(
        self, part: ModelReward, name: str, policy_model: str, policy_trusted: bool, same_tokens: bool
    ) -> None:
        """Load the model; collective.

        Args:
            name: of the part, for errors.
            policy_model: whose tokenizer reads the tokens.
            policy_trusted: the policy's `trust_remote_code`.
            same_tokens: the reward model has the policy's vocabulary, so tokens pass through as they are.
        """
        self.part, self.name = part, name
        model = load_scalar(
            part.model,
            dtype=DTYPES[part.engine.dtype],
            trust_remote_code=part.trust_remote_code,
            sharded=part.engine.zero_stage == 3,
        )
        self.engine = ForwardEngine(model, part.engine)
        self._scale = scale_of(part.model, trust_remote_code=part.trust_remote_code) if part.normalise else None
        self._positions = positions_of(part.model, trust_remote_code=part.trust_remote_code)
        self._tokenizers = (
            None
            if same_tokens
            else (
                load_tokenizer(policy_model, trust_remote_code=policy_trusted),
                load_tokenizer(part.model, trust_remote_code=part.trust_remote_code),
            )
        )

    def score(self, batch: TrajectoryBatch, index: int = 0, count: int = 1) -> ScorePart:
        """Scores of the samples in one of `count` slices."""
        with self.recorder.span("score"):
            if self._tokenizers is not None:
                batch = self._translate(batch)
            found = response_column(
                batch,
                self.slice_of(index, count),
                self.part.engine.micro_batch_tokens,
                lambda pack: self.engine(pack.packed, pack.last),
            )
            scores = self._scale.normalise(found.values) if self._scale else found.values
        bad = [batch.uids[s] for s, score in zip(found.samples, scores, strict=True) if not np.isfinite(score)]
        if bad:
            raise RewardError(self.name, f"the reward model {self.part.model!r} gave NaN or infinity", bad)
        return ScorePart(found.samples, scores)

    def _check_room(self, batch: TrajectoryBatch, lengths: Sequence[int]) -> None:
        """How long a sample is in this model's tokens is known only now."""
        positions = self._positions
        if positions is None or not positions.in_table or max(lengths) <= positions.tokens:
            return
        raise RewardError(
            self.name,
            f"the reward model {self.part.model!r} has positions for {positions.tokens} tokens, but samples have up to "
            f"{max(lengths)} of its tokens: lower data.max_prompt_tokens or rollout.sampling.max_new_tokens",
            [uid for uid, length in zip(batch.uids, lengths, strict=True) if length > positions.tokens],
        )

    def _translate(self, batch: TrajectoryBatch) -> TrajectoryBatch:
        """The same texts in this model's tokens, prompt and response as one text."""
        assert self._tokenizers is not None
        theirs, ours = self._tokenizers
        prompts, responses = decode_responses(batch, theirs)
        rows = ours([p + r for p, r in zip(prompts, responses, strict=True)], add_special_tokens=True)["input_ids"]
        self._check_room(batch, [len(row) for row in rows])
        tokens = np.concatenate([np.asarray(row, np.int32) for row in rows])
        return TrajectoryBatch(
            uids=batch.uids,
            sample_index=batch.sample_index,
            seeds=batch.seeds,
            prompt_tokens=np.empty(0, np.int32),
            prompt_offsets=np.zeros(len(rows) + 1, np.int64),
            response_tokens=tokens,
            response_offsets=offsets_of([len(row) for row in rows]),
            engine_logprobs=np.zeros(len(tokens), np.float32),
            weight_versions=np.zeros(len(tokens), np.int32),
            truncated=batch.truncated,
            loss_mask=np.ones(len(tokens), np.bool_),
            rows=batch.rows,
        )


class TextRewardWorker(Worker):
    """One worker of a function or a service that scores texts. Workers share the shards, each scoring whole ones."""

    @in_span("load model")
    def load_model(
        self,
        part: FunctionReward | HttpReward,
        policy_model: str,
        trust_remote_code: bool,
        columns: Sequence[str] = (),
    ) -> None:
        """Import the function, or make ready to call the service.

        Args:
            policy_model: whose tokenizer wrote the tokens.
            columns: that rows of prompts have beside their prompts.
        """
        self._columns = columns
        self._scorer = FunctionScorer(part) if isinstance(part, FunctionReward) else HttpScorer(part)
        self._tokenizer = load_tokenizer(policy_model, trust_remote_code=trust_remote_code)

    def device_bytes(self) -> None:
        """It has none, whatever devices its node has."""

    def score(self, batch: TrajectoryBatch) -> ScorePart:
        """Scores of all samples of a shard."""
        with self.recorder.span("score"):
            prompts, responses = decode_responses(batch, self._tokenizer)
            scores = self._scorer.score(prompts, responses, batch.uids, batch.rows.columns(self._columns))
            return ScorePart(tuple(range(len(batch))), scores)


class RewardModelGroup(RankGroup[RewardModelWorker]):
    """The ranks of a reward model, which may divide a shard."""

    load_model = on_all(RewardModelWorker.load_model)

    def score(self, shard: GeneratedShard) -> Calls[ScorePart]:
        """Scores of a shard."""
        return self.call_shard(RewardModelWorker.score, shard)


class TextRewardGroup(ActorGroup[TextRewardWorker]):
    """The workers of a function or a service, which take turns with whole shards."""

    load_model = on_all(TextRewardWorker.load_model)

    def score(self, shard: GeneratedShard) -> Calls[ScorePart]:
        """Scores of a shard."""
        return self.call_rank(shard.number, TextRewardWorker.score, shard.trajectories)
