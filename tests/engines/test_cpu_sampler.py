from collections.abc import Iterator

import pytest
import torch
from vllm.v1.sample.sampler import Sampler

from rlhf_ray.engines import cpu_sampler

LOGPROBS = torch.randn(7, 101).log_softmax(-1)
SAMPLED = torch.arange(7) * 3


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """As in an engine on CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_the_log_prob_of_the_sampled_token_is_vllms() -> None:
    ours, theirs = (gather(LOGPROBS, 0, SAMPLED) for gather in (Sampler.gather_logprobs, cpu_sampler.gather_all))
    assert torch.equal(ours.logprob_token_ids, theirs.logprob_token_ids)
    assert torch.equal(ours.logprobs, theirs.logprobs)
    assert ours.logprob_token_ids.dtype == theirs.logprob_token_ids.dtype
    assert ours.logprobs[:, 0].tolist() == [LOGPROBS[row, token].item() for row, token in enumerate(SAMPLED)]


def test_a_rank_that_nobody_counted_is_none() -> None:
    ranks = Sampler.gather_logprobs(LOGPROBS, 0, SAMPLED).selected_token_ranks
    theirs = cpu_sampler.gather_all(LOGPROBS, 0, SAMPLED).selected_token_ranks
    assert ranks.tolist() == [cpu_sampler.NO_RANK] * 7
    assert (ranks.shape, ranks.dtype) == (theirs.shape, theirs.dtype)
    assert theirs.min() > cpu_sampler.NO_RANK


def test_whoever_asks_for_more_gets_all_that_vllm_makes() -> None:
    ours, theirs = (gather(LOGPROBS, 2, SAMPLED) for gather in (Sampler.gather_logprobs, cpu_sampler.gather_all))
    for found, expected in zip(ours, theirs, strict=True):
        assert found is expected is None or torch.equal(found, expected)
