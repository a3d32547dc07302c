"""A rank of a language model that learns to write what it is shown."""

from collections.abc import Sequence

import numpy as np
import torch

from rlhf_ray.actors.epoch_training import EpochTrainedWorker, Stats
from rlhf_ray.config.training import SFTPolicy
from rlhf_ray.data.conversations import ConversationSet
from rlhf_ray.engines.training import DTYPES, TrainingEngine
from rlhf_ray.models.heads import load_causal
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.platform import platform
from rlhf_ray.telemetry.metrics import Mean


class SFTWorker(EpochTrainedWorker):
    """One rank of the policy."""

    def load_model(self, policy: SFTPolicy, total_steps: int) -> None:
        """Load the model and build its training engine; collective."""
        self.model_source, self.trust_remote_code = policy.model, policy.trust_remote_code
        model = load_causal(
            policy.model,
            dtype=DTYPES[policy.engine.dtype],
            vocab_chunk_tokens=policy.engine.vocab_chunk_tokens,
            trust_remote_code=policy.trust_remote_code,
        )
        self.engine = TrainingEngine(model, policy.engine, policy.optimizer, total_steps)

    def micro_batch_loss(self, data: ConversationSet, rows: Sequence[int]) -> tuple[torch.Tensor, Stats]:
        """Sum of −log p over the learnt tokens of some rows."""
        device = platform().device
        texts = [data.tokens(row) for row in rows] or [data.tokens(0)[:1]]
        packed = PackedSequences.of(texts, device)
        starts = np.cumsum([0, *map(len, texts)])
        places = [start + data.learnt_places(row) for start, row in zip(starts, rows, strict=False)]
        learnt = torch.from_numpy(np.concatenate([*places, np.empty(0, np.int64)]).astype(np.int64)).to(device)
        # A token is predicted one place before it.
        logprobs, entropy = self.engine(packed, learnt - 1, packed.input_ids[0][learnt], 1.0)
        loss = -logprobs.sum()
        tokens = len(learnt)
        found = {"loss": Mean(float(loss.detach()), tokens), "entropy": Mean(float(entropy.detach().sum()), tokens)}
        return loss, found if rows else {}
