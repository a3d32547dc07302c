"""Which samples each rank trains on in which optimizer step."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.packing import plan_micro_batches


@dataclass(frozen=True)
class OptimizerStep:
    """One rank's part of an optimizer step.

    Attributes:
        micro_batches: sample numbers within the PPO batch; an empty one is run as a dummy, because ZeRO-3 needs the
            same number of passes on all ranks.
        step_tokens, step_samples: tokens that count in the loss, and samples, of the whole step, over all ranks: what
            losses are divided by.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    step_tokens: int
    step_samples: int


def plan_update(
    prompt_lengths: NDArray[np.int64],
    response_lengths: NDArray[np.int64],
    action_lengths: NDArray[np.int64],
    *,
    epochs: int,
    optimizer_steps: int,
    dp_size: int,
    max_tokens: int,
    seed: int,
) -> list[list[OptimizerStep]]:
    """Cut a batch into optimizer steps, each spread over ranks and packed into micro-batches.

    Each sample is in exactly one step of each epoch. With several steps the batch is shuffled anew in each epoch.

    Args:
        prompt_lengths, response_lengths: tokens, `[samples]`.
        action_lengths: tokens of the responses that count in the loss, `[samples]`.
        max_tokens: of a micro-batch.

    Returns:
        For each data-parallel rank, its steps in order.
    """
    samples = len(prompt_lengths)
    random = np.random.default_rng(seed)
    plans: list[list[OptimizerStep]] = [[] for _ in range(dp_size)]
    for _ in range(epochs):
        order = np.arange(samples) if optimizer_steps == 1 else random.permutation(samples)
        for part in np.array_split(order, optimizer_steps):
            lengths = prompt_lengths[part] + response_lengths[part]
            spread = plan_micro_batches(lengths, dp_size, max_tokens)
            for plan, micro_batches in zip(plans, spread, strict=True):
                plan.append(
                    OptimizerStep(
                        micro_batches=tuple(tuple(int(part[i]) for i in micro) for micro in micro_batches),
                        step_tokens=int(action_lengths[part].sum()),
                        step_samples=len(part),
                    )
                )
    return plans
