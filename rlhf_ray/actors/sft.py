"""A rank of a language model that learns to write what it is shown."""

from collections.abc import Sequence

import numpy as np
import torch

from rlhf_ray.actors.device_means import DeviceMean, MicroStats
from rlhf_ray.actors.epoch_training import EpochTrainedGroup, EpochTrainedWorker
from rlhf_ray.actors.group import on_all
from rlhf_ray.config.training import SFTPolicy
from rlhf_ray.data.conversations import ConversationSet
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.platform import platform, to_device
from rlhf_ray.telemetry.trace import in_span


class SFTWorker(EpochTrainedWorker):
    """One rank of the policy."""

    @in_span("load model")
    def load_model(self, policy: SFTPolicy, total_steps: int) -> None:
        """Load the model and build its training engine; collective."""
        self.load_language_model(policy, total_steps)

    def micro_batch_loss(self, data: ConversationSet, rows: Sequence[int]) -> tuple[torch.Tensor, MicroStats]:
        """Sum of −log p over the learnt tokens of some rows."""
        packed, positions, targets = pack_learnt(data, rows, platform().device)
        logprobs, entropy = self.engine(packed, positions, targets, 1.0)
        loss = -logprobs.sum()
        tokens = len(targets)
        found = {"loss": DeviceMean(loss.detach(), tokens), "entropy": DeviceMean(entropy.detach().sum(), tokens)}
        return loss, found if rows else {}


class SFTGroup(EpochTrainedGroup[SFTWorker]):
    """The ranks of the policy."""

    load_model = on_all(SFTWorker.load_model)


def pack_learnt(
    data: ConversationSet, rows: Sequence[int], device: torch.device
) -> tuple[PackedSequences, torch.Tensor, torch.Tensor]:
    """Rows packed, the places in the pack that predict their learnt tokens, and these tokens, int64 `[learnt]`.

    No rows make a dummy pack without learnt tokens.
    """
    texts = [data.tokens(row) for row in rows] or [data.tokens(0)[:1]]
    packed = PackedSequences.of(texts, device)
    starts = np.cumsum([0, *map(len, texts)])
    places = [start + data.learnt_places(row) for start, row in zip(starts, rows, strict=False)]
    learnt = torch.from_numpy(np.concatenate([*places, np.empty(0, np.int64)]).astype(np.int64))
    learnt = to_device(learnt, device)
    return packed, learnt - 1, packed.input_ids[0][learnt]
