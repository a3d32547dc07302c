"""How long prompts and responses are taken to be."""

import math
from dataclasses import dataclass

from rlhf_ray.config.jobs import JobConfig, PPOJob, PreferenceJob

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and responses. Each token of a response is the last with the same probability, until the
    longest response is cut off.

    Attributes:
        prompt: mean of prompts.
        response: mean of responses; at least `longest` means that all are that long.
        longest: response.
    """

    prompt: float
    response: float
    longest: int

    def responses(self, number: int) -> list[float]:
        """Lengths of so many responses: evenly spaced quantiles, in an order that is as mixed as chance."""
        ending = self._ending
        shares = ((0.5 + place * _GOLDEN) % 1.0 for place in range(number))
        return [min(self.longest, -math.log1p(-share) / ending) if ending else self.longest for share in shares]

    @property
    def _ending(self) -> float:
        """Rate at which responses end by themselves, for which their mean is right."""
        if self.response >= self.longest:
            return 0.0
        low, high = 0.0, 1.0 / self.response  # at the upper end the mean would be right without a cut
        for _ in range(60):
            middle = (low + high) / 2
            mean = -math.expm1(-middle * self.longest) / middle
            low, high = (middle, high) if mean > self.response else (low, middle)
        return (low + high) / 2


def lengths_of(job: JobConfig, prompt: float | None = None, response: float | None = None) -> Lengths:
    """Of a job.

    Args:
        prompt, response: mean tokens of prompts and responses, in a job over a data set of what is not learnt of a row
            and of what is (of a pair's answers each). By default the longest that the config allows; of a pair, the
            prompt then has half of them.
    """
    if isinstance(job, PPOJob):
        most, longest = job.max_prompt_tokens, job.rollout.sampling.max_new_tokens
    elif isinstance(job, PreferenceJob):
        most, longest = job.data.max_tokens // 2, job.data.max_tokens - job.data.max_tokens // 2
    else:
        most, longest = 0, job.data.max_tokens
    return Lengths(most if prompt is None else prompt, longest if response is None else response, longest)
