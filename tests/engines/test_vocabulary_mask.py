"""The mask over rows of the vocabulary that no token has, in both of vLLM's model runners."""

from types import SimpleNamespace
from typing import Any, cast

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.worker.gpu.sample.logits_processor.loader import (
    build_custom_logits_processors,
    build_custom_logits_processors_params_validator,
)

from rlhf_ray.engines.vocabulary_mask import TOKEN_IDS, TOKENS_ONLY

CONFIG = cast(
    Any,
    SimpleNamespace(
        additional_config={TOKEN_IDS: 5},
        speculative_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=4, async_scheduling=False),
    ),
)


def assert_masks(masked: torch.Tensor) -> None:
    assert torch.equal(masked[:, :5], torch.ones(3, 5))
    assert torch.equal(masked[:, 5:], torch.full((3, 2), -torch.inf))


def test_the_first_runner_masks_also_where_it_decodes_greedily() -> None:
    made = build_logitsprocs(CONFIG, torch.device("cpu"), False, False, (TOKENS_ONLY,))
    [mask] = [processor for processor in made.non_argmax_invariant if type(processor).__name__ == "TokensOnly"]
    mask.update_state(None)
    assert_masks(mask.apply(torch.ones(3, 7)))


def test_the_second_runner_masks_every_request() -> None:
    state = cast(Any, SimpleNamespace(**dict.fromkeys(
        ("device", "max_num_reqs", "vocab_size", "all_token_ids", "prompt_len", "prefill_len", "total_len")
    )))  # fmt: skip
    [mask] = build_custom_logits_processors(CONFIG, state, False, (TOKENS_ONLY,))
    assert mask.add_request(0, SamplingParams())
    mask.apply_staged_writes()
    assert_masks(mask.apply(torch.ones(3, 7), cast(Any, None)))
    build_custom_logits_processors_params_validator((TOKENS_ONLY,))(SamplingParams())
