"""Log-probs of sampled tokens on CPU, without what vLLM computes beside them.

vLLM 0.32 looks for the best tokens even when none is asked for, and counts how many tokens are as likely as the sampled
one, both over the whole vocabulary in eager torch. That takes longer than the log-probs themselves, a tenth of the time
that a small model decodes, and nobody reads it here. Importing this module has samplers leave it out.
"""

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.sampler import Sampler

NO_RANK = 0
"""Ranks begin at 1."""

gather_all = Sampler.gather_logprobs


def _gather(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
    """The log-probs of `token_ids`, `[tokens, 1]`, and, where more are asked for, what vLLM makes of them.

    Args:
        logprobs: `[tokens, vocabulary]`.
        num_logprobs: best tokens that are asked for.
        token_ids: sampled, int64 `[tokens]`.
    """
    if num_logprobs > 0:
        return gather_all(logprobs, num_logprobs, token_ids)
    ids = token_ids.unsqueeze(-1)
    return LogprobsTensors(ids.to(torch.int32), logprobs.gather(-1, ids), torch.full_like(token_ids, NO_RANK))


Sampler.gather_logprobs = staticmethod(_gather)  # type: ignore[method-assign]
