"""Weights that turn losses per token into the loss of a whole optimiser step, however the step is split."""

from typing import Literal

import torch
from torch import Tensor

from rlhf_ray.algorithms.checks import check_lengths, check_option
from rlhf_ray.algorithms.errors import OptionError, TensorInputError

AggregationMode = Literal["token", "sample"]


def token_weights(
    lengths: Tensor, mode: AggregationMode, step_tokens: int, step_samples: int, loss_mask: Tensor | None = None
) -> Tensor:
    """Weight of every token of a micro-batch in the loss of its optimiser step.

        token:  w_t = 1 / step_tokens                        mean over the tokens of the step
        sample: w_t = 1 / (step_samples · length of sample)  mean over samples of the means over their tokens

    With `loss_mask`, tokens that are masked out have the weight 0 and are in no length.

    The loss of the step is the sum of w_t · l_t over all micro-batches and all ranks. A weight depends on its own
    sample and on the totals of the step only, so the split changes nothing. Where gradients are averaged over ranks
    rather than summed, the caller multiplies by the number of ranks.

    Sources: token: Yu et al. 2025, "DAPO", arXiv:2503.14476, section 3.3; sample: Shao et al. 2024, "DeepSeekMath",
    arXiv:2402.03300, equation 3.

    Args:
        lengths: response tokens of each sample of the micro-batch, int64 `[samples]`, at least 1 each.
        mode: what the mean is over.
        step_tokens: response tokens that count, of the whole step, all ranks and micro-batches.
        step_samples: samples of the whole step, all ranks and micro-batches.
        loss_mask: bool `[tokens]`, whether a token counts; None where all do.

    Returns:
        float32 `[tokens]`.

    Raises:
        TensorInputError: lengths is not int64 `[samples]`.
        SampleError: a sample is empty.
        OptionError: unknown mode, or a total smaller than this micro-batch alone.
    """
    check_lengths(lengths)
    samples, tokens = lengths.numel(), int(lengths.sum())
    counted = lengths
    if loss_mask is not None:
        if loss_mask.shape != (tokens,):
            raise TensorInputError("loss_mask", f"length {tokens}", f"shape {tuple(loss_mask.shape)}")
        ends = lengths.cumsum(0)
        before = torch.cat([ends.new_zeros(1), loss_mask.cumsum(0)])
        counted = before[ends] - before[ends - lengths]
        tokens = int(counted.sum())
    check_option("step_tokens", step_tokens, step_tokens >= tokens, f"at least the {tokens} of this micro-batch")
    check_option("step_samples", step_samples, step_samples >= samples, f"at least the {samples} of this micro-batch")
    match mode:
        case "token":
            weights = torch.full_like(counted, 1 / max(step_tokens, 1), dtype=torch.float64)
        case "sample":
            weights = 1 / (step_samples * counted.double())
        case _:
            raise OptionError("mode", mode, "token or sample")
    spread = weights.repeat_interleave(lengths).float()
    return spread if loss_mask is None else torch.where(loss_mask, spread, torch.zeros_like(spread))
