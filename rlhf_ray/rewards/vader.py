"""VADER sentiment as a reward (Hutto and Gilbert, ICWSM 2014): a lexicon and rules, no model, 0.04 ms a text.

In a config: `function: rlhf_ray.rewards.vader:score`. In the quickstart it is logged beside the learned reward as
an independent view and never trained against.
"""

from functools import cache
from typing import Any


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """The compound sentiment of each response, -1 (negative) to 1 (positive); the prompts are not looked at.

    Raises:
        ModuleNotFoundError: vaderSentiment is not installed; it is in the extra `examples`.
    """
    analyzer = _analyzer()
    return [float(analyzer.polarity_scores(response)["compound"]) for response in responses]


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the reward rlhf_ray.rewards.vader:score needs vaderSentiment: pip install 'rlhf_ray[examples]'"
        ) from error
    return SentimentIntensityAnalyzer()
