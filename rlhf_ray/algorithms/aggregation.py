"""Weights that turn losses per token into the loss of a whole optimiser step, however the step is split."""

from typing import Literal

import torch
from torch import Tensor

from rlhf_ray.algorithms.checks import check_lengths, check_option
from rlhf_ray.algorithms.errors import OptionError

AggregationMode = Literal["token", "sample"]


def token_weights(lengths: Tensor, mode: AggregationMode, step_tokens: int, step_samples: int) -> Tensor:
    """Weight of every token of a micro-batch in the loss of its optimiser step.

        token:  w_t = 1 / step_tokens                        mean over the tokens of the step
        sample: w_t = 1 / (step_samples · length of sample)  mean over samples of the means over their tokens

    The loss of the step is the sum of w_t · l_t over all micro-batches and all ranks. A weight depends on its own
    sample and on the totals of the step only, so the split changes nothing. Where gradients are averaged over ranks
    rather than summed, the caller multiplies by the number of ranks.

    Sources: token: Yu et al. 2025, "DAPO", arXiv:2503.14476, section 3.3; sample: Shao et al. 2024, "DeepSeekMath",
    arXiv:2402.03300, equation 3.

    Args:
        lengths: response tokens of each sample of the micro-batch, int64 `[samples]`, at least 1 each.
        mode: what the mean is over.
        step_tokens: response tokens of the whole step, all ranks and micro-batches.
        step_samples: samples of the whole step, all ranks and micro-batches.

    Returns:
        float32 `[tokens]`.

    Raises:
        TensorInputError: lengths is not int64 `[samples]`.
        SampleError: a sample is empty.
        OptionError: unknown mode, or a total smaller than this micro-batch alone.
    """
    check_lengths(lengths)
    samples, tokens = lengths.numel(), int(lengths.sum())
    check_option("step_tokens", step_tokens, step_tokens >= tokens, f"at least the {tokens} of this micro-batch")
    check_option("step_samples", step_samples, step_samples >= samples, f"at least the {samples} of this micro-batch")
    match mode:
        case "token":
            return torch.full((tokens,), 1 / max(step_tokens, 1), dtype=torch.float32, device=lengths.device)
        case "sample":
            per_sample = 1 / (step_samples * lengths.double())
            return per_sample.repeat_interleave(lengths).float()
        case _:
            raise OptionError("mode", mode, "token or sample")
