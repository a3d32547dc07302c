"""Rewards as users write them, good and bad."""

import math
import os
import tempfile
import time
from pathlib import Path


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    """Between 0 and 1 for any text."""
    return [response.count("e") / (1 + len(response)) for response in responses]


def letters_of_counted(responses: list[str], prompts: list[str], words: list[int]) -> list[float]:
    """As `letters`, where the column `words` of each sample's row says how many words its prompt has."""
    if [len(prompt.split()) for prompt in prompts] != words:
        raise ValueError(f"{prompts} have not {words} words")
    return letters(prompts, responses)


def raises(prompts: list[str], responses: list[str]) -> list[float]:
    raise KeyError("no such lexicon entry")


def gives_nan(prompts: list[str], responses: list[str]) -> list[float]:
    return [math.nan if number == 1 else 0.5 for number in range(len(responses))]


def gives_too_few(prompts: list[str], responses: list[str]) -> list[float]:
    return letters(prompts, responses)[1:]


def gives_too_much(prompts: list[str], responses: list[str]) -> list[float]:
    """Finite, but its square is not."""
    return [1e30] * len(responses)


# Where a file lets `gated` go on. Named by the tests' own process, which is in the environment of all that it starts.
GATE = Path(tempfile.gettempdir()) / f"rlhf-ray-gate-{os.environ.get('RLHF_RAY_TESTS', os.getpid())}"


def gated(prompts: list[str], responses: list[str]) -> list[float]:
    """Scores once there is a file at `GATE`."""
    while not GATE.exists():
        time.sleep(0.02)
    return letters(prompts, responses)
