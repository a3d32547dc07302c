"""When the responses of one rollout engine are complete: continuous batching, step by step."""

import heapq
from dataclasses import dataclass

from rlhf_ray.config.training import Dtype
from rlhf_ray.models.shapes import ModelShape
from rlhf_ray.planner.calibration import Calibration
from rlhf_ray.planner.pass_time import ProcessGroup, Rates
from rlhf_ray.planner.work import BYTES, Lengths, cached_bytes, layer_parameters, touched_parameters

# Sequences are followed in groups that start together: enough to see how a batch drains, few enough to be quick.
_GROUPS_AT_A_TIME = 32
_MOST_GROUPS = 512
_LOGIT_MOVES = 8  # of float32 logits in sampling: temperature, softmax, noise, maximum, log-prob


@dataclass(frozen=True)
class DecodingEngine:
    """One engine.

    Attributes:
        shape: of the policy.
        dtype: of the engine's weights and of its cache.
        slots: sequences that it decodes at a time, as its settings and its cache allow.
        prompts_shared: samples of a prompt, whose keys and values are computed once.
        rates: of one of its workers.
        workers: over which weights are split.
        constants: of their kind of device.
    """

    shape: ModelShape
    dtype: Dtype
    slots: int
    prompts_shared: int
    rates: Rates
    workers: ProcessGroup
    constants: Calibration

    def prompt_s(self, tokens: float) -> float:
        """Seconds of prompts of so many tokens, where they are not cached."""
        return self.constants.generation.prompt * self.ideal_prompt_s(tokens / self.prompts_shared)

    def ideal_prompt_s(self, tokens: float) -> float:
        """Seconds of their products at the peak."""
        return 2 * layer_parameters(self.shape) * tokens / self._peak

    def step_s(self, sequences: float, context: float) -> float:
        """Seconds in which each of some sequences gets a token.

        Args:
            context: tokens before it that a sequence has, mean.
        """
        ideal = self.ideal_step(sequences, context)
        terms: dict[str, float] = {
            name: getattr(self.constants.generation, name) * seconds for name, seconds in ideal.items()
        }
        if self.rates.ahead:  # reading weights and multiplying with them overlap
            terms["weights"] = max(terms["weights"], terms.pop("products"))
        layers, size = self.shape.layers, BYTES[self.dtype]
        talk = self.workers.all_reduce_s(
            2 * layers * sequences * self.shape.hidden * size, self.constants.collectives, calls=2 * layers
        )
        return sum(terms.values()) + talk

    def ideal_step(self, sequences: float, context: float) -> dict[str, float]:
        """By the name of its factor, what each part of a step takes at the device's peaks; for constants, how many.

        Weights are read once for all sequences, keys and values for each (Pope et al. 2022, section 2.2).
        """
        shape, memory, workers = self.shape, self.rates.memory, self.workers.ranks
        return {
            "weights": touched_parameters(shape, sequences) * BYTES[self.dtype] / workers / memory,
            "products": 2 * (layer_parameters(shape) + shape.head_parameters) * sequences / self._peak,
            "cache": sequences * context * cached_bytes(shape, self.dtype, workers) / memory,
            "vocabulary": sequences * _LOGIT_MOVES * shape.vocab * 4 / memory,
            "sequence_s": sequences,
            "layer_s": float(shape.layers),
            "step_s": 1.0,
        }

    def finish_times(self, samples: int, lengths: Lengths) -> list[float]:
        """Seconds from the first prompt until samples are complete, in the order in which they start.

        Each entry stands for as many samples as the others.
        """
        together = min(self.slots, samples)
        number = min(_MOST_GROUPS, -(-samples * _GROUPS_AT_A_TIME // together), samples)
        size = samples / number
        room = max(1, round(self.slots / size))
        waiting = list(enumerate(lengths.responses(number)))[::-1]
        finished = [0.0] * number
        running: list[tuple[float, int, float]] = []  # token at which it ends, number, token at which it started
        seconds = token = started = 0.0
        while waiting or running:
            while waiting and len(running) < room:
                place, response = waiting.pop()
                heapq.heappush(running, (token + response, place, token))
                started += token
                seconds += self.prompt_s(size * lengths.prompt)
            end, place, began = running[0]
            context = lengths.prompt + (token + end) / 2 - started / len(running)
            seconds += (end - token) * self.step_s(len(running) * size, context)
            token = end
            heapq.heappop(running)
            started -= began
            finished[place] = seconds
        return finished

    @property
    def _peak(self) -> float:
        """Operations a second of all workers."""
        return self.rates.flops(self.dtype) * self.workers.ranks


def shard_arrivals(finished: list[float], shards: int) -> list[float]:
    """Seconds at which shards are complete, of samples that start in order: each with its slowest sample."""
    arrivals = []
    for shard in range(shards):
        first = shard * len(finished) // shards
        last = max(first + 1, -(-(shard + 1) * len(finished) // shards))
        arrivals.append(max(finished[first:last]))
    return arrivals
