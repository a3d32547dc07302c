"""Rows of the vocabulary that no token has are never sampled: many models pad it to a round number."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as FirstRunnersProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as SecondRunnersProcessor

TOKENS_ONLY = "rlhf_ray.engines.vocabulary_mask:TokensOnly"
"""What an engine is given as `logits_processors`."""
TOKEN_IDS = "rlhf_ray_token_ids"
"""Key in `additional_config`: how many ids a token can have, from 0."""


class TokensOnly(FirstRunnersProcessor, SecondRunnersProcessor):
    """Logits behind the last token id become -inf before anything else looks at them, log-probs included.

    One fill of a slice for the whole batch, whatever is in it: `allowed_token_ids` would copy a list of all ids with
    every request. vLLM has two model runners, each with an interface of its own for such a processor.
    """

    def __init__(self, vllm_config: VllmConfig, *_: Any) -> None:
        settings = vllm_config.additional_config
        assert isinstance(settings, dict)
        self._ids: int = settings[TOKEN_IDS]

    def apply(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        """Mask logits `[rows, vocabulary]` in place."""
        logits[:, self._ids :] = -torch.inf
        return logits

    def is_argmax_invariant(self) -> bool:
        """The first runner leaves out processors for which this is true when it decodes greedily."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Nothing is kept of any request."""
