"""Parts that samples are dealt into: one for each rank, or for as many ranks as share sequences."""

from dataclasses import dataclass

from rlhf_ray.config.training import ScoringEngine, TrainingEngine


@dataclass(frozen=True)
class Shares:
    """Those of one model. As text they are what they follow from.

    Attributes:
        ranks_key, ranks: where the ranks are set, such as `placement.policy.ranks`, and how many there are.
        engine_key, engine: how the model is held, such as `policy.engine`.
    """

    ranks_key: str
    ranks: int
    engine_key: str
    engine: TrainingEngine | ScoringEngine

    @property
    def count(self) -> int:
        """How many there are."""
        return self.ranks // self.engine.sequence_parallel

    def __str__(self) -> str:
        together = self.engine.sequence_parallel
        divided = "" if together == 1 else f" ÷ {self.engine_key}.sequence_parallel ({together})"
        return f"{self.ranks_key} ({self.ranks}){divided}"

    def check(self) -> None:
        """Raise ValueError when some ranks would be left without neighbours to share sequences with."""
        together = self.engine.sequence_parallel
        if self.ranks % together:
            raise ValueError(
                f"{self.engine_key}.sequence_parallel ({together}) does not divide {self.ranks_key} ({self.ranks})"
            )
