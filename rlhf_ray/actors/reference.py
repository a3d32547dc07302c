"""The reference model: log-probs under the model that the policy is held close to or compared with."""

from collections.abc import Sequence
from pathlib import Path

import ray

from rlhf_ray.actors.answers import AnswerLogProbs
from rlhf_ray.actors.columns import response_column
from rlhf_ray.actors.epoch_training import RowPlan
from rlhf_ray.actors.group import Calls, on_all
from rlhf_ray.actors.shards import GeneratedShard
from rlhf_ray.actors.waiting import fetch_data
from rlhf_ray.actors.worker import RankGroup, Worker
from rlhf_ray.config.training import ScoringEngine
from rlhf_ray.data.columns import ColumnPart
from rlhf_ray.data.trajectory import TrajectoryBatch
from rlhf_ray.engines.training import DTYPES, ForwardEngine
from rlhf_ray.models.heads import count_ids, load_causal, load_tokenizer
from rlhf_ray.telemetry.trace import in_span


class ReferenceWorker(Worker):
    """One rank of the reference model."""

    engine: ForwardEngine

    @in_span("load model")
    def load_model(
        self,
        model: str,
        engine: ScoringEngine,
        temperature: float,
        trust_remote_code: bool,
        tokens_only: bool = False,
    ) -> None:
        """Load the model; collective.

        Args:
            tokens_only: leave rows of the vocabulary that no token has out of every probability, as the rollout engines
                and the policy of a PPO job do.
        """
        self.config, self.temperature = engine, temperature
        loaded = load_causal(
            model,
            dtype=DTYPES[engine.dtype],
            vocab_chunk_tokens=engine.vocab_chunk_tokens,
            trust_remote_code=trust_remote_code,
            sharded=engine.zero_stage == 3,
            token_ids=count_ids(load_tokenizer(model, trust_remote_code=trust_remote_code)) if tokens_only else None,
        )
        self.engine = ForwardEngine(loaded, engine)

    def logprobs(self, batch: TrajectoryBatch, index: int = 0, count: int = 1) -> ColumnPart:
        """Log-probs of the responses in one of `count` slices."""
        with self.recorder.span("log-probs"):
            return response_column(
                batch,
                self.slice_of(index, count),
                self.config.micro_batch_tokens,
                lambda pack: self.engine(pack.packed, pack.positions, pack.targets, self.temperature, "nothing")[0],
            )

    def answer_logprobs(self, data: Sequence[ray.ObjectRef], micro_batches: Sequence[Sequence[int]]) -> AnswerLogProbs:
        """Log-probs of the answers in this rank's slice of some rows of a `ComparisonSet`."""
        [found] = fetch_data(data, "the data set")
        with self.recorder.span("log-probs"):
            return AnswerLogProbs.of(self.engine, found, micro_batches, reports=self.data_slice.reports)

    def mix_weights(self, shared: Sequence[Sequence[ray.ObjectRef]], fraction: float) -> None:
        """Move every weight by `fraction` of its way to the policy's; collective.

        Args:
            shared: what each of the policy's ranks gave for `PreferenceWorker.share_weights`.
        """
        with self.recorder.span("update reference"):
            for bucket in (ref for refs in shared for ref in refs):
                self.engine.mix(fetch_data([bucket], "the policy's weights")[0], fraction)

    def save(self, folder: Path) -> None:
        """Write the weights of a reference that is updated; rank 0 writes them whole."""
        with self.recorder.span("checkpoint"):
            self.engine.save(folder, write=self.rank == 0)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        with self.recorder.span("load checkpoint"):
            self.engine.load(folder)


class ReferenceGroup(RankGroup[ReferenceWorker]):
    """The ranks of the reference model."""

    load_model = on_all(ReferenceWorker.load_model)
    mix_weights = on_all(ReferenceWorker.mix_weights)
    save = on_all(ReferenceWorker.save)
    load = on_all(ReferenceWorker.load)

    def logprobs(self, shard: GeneratedShard) -> Calls[ColumnPart]:
        """Log-probs of a shard's responses."""
        return self.call_shard(ReferenceWorker.logprobs, shard)

    def answer_logprobs(self, plan: RowPlan) -> Calls[AnswerLogProbs]:
        """Log-probs of the answers of some rows."""
        return self.call_each(ReferenceWorker.answer_logprobs, plan)
