"""Who does the work of the job."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from rlhf_ray.actors.group import ActorGroup, Calls, on_all
from rlhf_ray.actors.trained import TrainedGroup, TrainedWorker, UpdateReport
from rlhf_ray.actors.worker import Worker
from rlhf_ray.config.training import SFTPolicy
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.platform import platform
from rlhf_ray.telemetry.metrics import Mean


class StudentWorker(TrainedWorker):
    """One rank of the student."""

    def load_model(self, student: SFTPolicy, steps: int) -> None:
        """Load the model and build its training engine; collective."""
        self.load_language_model(student, steps)

    def step(self, rows: Sequence[Sequence[int]], weights: Sequence[float]) -> UpdateReport:
        """One optimizer step."""
        began = time.perf_counter()
        texts = [np.asarray(row, np.int32) for row in rows]
        packed = PackedSequences.of(texts, platform().device)
        ends = np.cumsum([len(text) for text in texts])
        places = np.concatenate([np.arange(end - len(text), end - 1) for text, end in zip(texts, ends, strict=True)])
        positions = torch.from_numpy(places)
        logprobs, _ = self.engine(packed, positions, packed.input_ids[0][positions + 1], 1.0)
        by_token = torch.tensor(np.repeat(weights, [len(text) - 1 for text in texts]), dtype=logprobs.dtype)
        loss = -(by_token * logprobs).sum() / by_token.sum()
        self.engine.backward(loss, last=True)
        done = self.engine.step()
        return UpdateReport({"loss": Mean(loss.item(), 1.0)}, done.lr, 1, len(rows), time.perf_counter() - began)


class StudentGroup(TrainedGroup[StudentWorker]):
    """The ranks of the student."""

    load_model = on_all(StudentWorker.load_model)
    step = on_all(StudentWorker.step)


class TellerWorker(Worker):
    """Weighs texts; a role that holds no model."""

    def weigh(self, texts: Sequence[str], word: str) -> list[float]:
        """One, and one more for each place where the word is."""
        with self.recorder.span("score"):
            return [1.0 + text.count(word) for text in texts]


class TellerGroup(ActorGroup[TellerWorker]):
    """The teller."""

    def weigh(self, texts: Sequence[str], word: str) -> Calls[list[float]]:
        """Weights of texts."""
        return self.call_rank(0, TellerWorker.weigh, texts, word)
