"""Rewards as users write them, good and bad."""

import math


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    """Between 0 and 1 for any text."""
    return [response.count("e") / (1 + len(response)) for response in responses]


def raises(prompts: list[str], responses: list[str]) -> list[float]:
    raise KeyError("no such lexicon entry")


def gives_nan(prompts: list[str], responses: list[str]) -> list[float]:
    return [math.nan if number == 1 else 0.5 for number in range(len(responses))]


def gives_too_few(prompts: list[str], responses: list[str]) -> list[float]:
    return letters(prompts, responses)[1:]


def gives_too_much(prompts: list[str], responses: list[str]) -> list[float]:
    """Finite, but its square is not."""
    return [1e30] * len(responses)
