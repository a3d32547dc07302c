"""Prompts with the answers to other prompts, by which KTO measures how far the policy has moved."""

from dataclasses import replace

import numpy as np

from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.data.trajectory import offsets_of


def mismatched(data: ComparisonSet, max_tokens: int) -> ComparisonSet:
    """Each row's prompt with the answer of the next row that has another prompt, as in Ethayarajh et al. 2024,
    arXiv:2402.01306, section 4.1. The last rows go on at the first; where all prompts are the same, the next row's
    answer is taken.

    The pairing is that of the file, so that it does not depend on which rows make a step.

    Args:
        data: one candidate a row.
        max_tokens: budget of prompt and answer; an answer is cut to what the prompt leaves, at least one token.
    """
    rows = len(data)
    prompts = [data.tokens(row)[: data.answer_starts[row]] for row in range(rows)]
    answers = [data.tokens(row)[data.answer_starts[row] :] for row in range(rows)]
    others = _next_with_another([prompt.tobytes() for prompt in prompts])
    texts = [
        np.concatenate([prompt, answers[other][: max(1, max_tokens - len(prompt))]])
        for prompt, other in zip(prompts, others, strict=True)
    ]
    return replace(data, token_ids=np.concatenate(texts), token_offsets=offsets_of([len(text) for text in texts]))


def _next_with_another(prompts: list[bytes]) -> list[int]:
    """For each row the next one, going round, whose prompt differs; the very next when none does."""
    rows = len(prompts)
    found = [0] * rows
    # From the end of a second round back: what the next row found holds for a row with the same prompt as it.
    for row in range(2 * rows - 1, -1, -1):
        here, after = row % rows, (row + 1) % rows
        differs = prompts[here] != prompts[after] or row == 2 * rows - 1
        found[here] = after if differs else found[after]
    return [other if prompts[other] != prompts[row] else (row + 1) % rows for row, other in enumerate(found)]
