"""The reference model: log-probs of the responses under the model that the policy is held close to."""

from rlhf_ray.actors.columns import ColumnPart, response_column
from rlhf_ray.actors.worker import Worker
from rlhf_ray.config.training import ScoringEngine
from rlhf_ray.data.trajectory import TrajectoryBatch
from rlhf_ray.engines.training import DTYPES, ForwardEngine
from rlhf_ray.models.heads import load_causal


class ReferenceWorker(Worker):
    """One rank of the reference model."""

    def load_model(self, model: str, engine: ScoringEngine, temperature: float, trust_remote_code: bool) -> None:
        """Load the model; collective."""
        self.config, self.temperature = engine, temperature
        loaded = load_causal(
            model,
            dtype=DTYPES[engine.dtype],
            vocab_chunk_tokens=engine.vocab_chunk_tokens,
            trust_remote_code=trust_remote_code,
        )
        self.engine = ForwardEngine(loaded, engine)

    def logprobs(self, batch: TrajectoryBatch) -> ColumnPart:
        """This rank's share of the responses' log-probs."""
        with self.recorder.span("log-probs"):
            return response_column(
                batch,
                self.rank,
                self.world_size,
                self.config.micro_batch_tokens,
                lambda pack: self.engine(pack.packed, pack.positions, pack.targets, self.temperature)[0],
            )
