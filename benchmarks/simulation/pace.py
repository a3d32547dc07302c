"""How long the work would take: an 8B model in bfloat16, one GPU for each rank and engine.

The constants are those of an H100: 989 TFLOP/s of which training and scoring reach 400, and 3.35 TB/s, from which the
16 GB of weights are read in 5 ms and the 128 KiB of keys and values of each of 256 sequences of 1,500 tokens in 15 ms
for every token that is decoded.
"""

from dataclasses import dataclass

PARAMETERS = 8e9
FLOPS = 4e14


@dataclass(frozen=True)
class Pace:
    """Seconds of work.

    Attributes:
        speed: how many times faster the simulation runs than what it simulates.
        decode_s: one token of one sequence, when an engine runs no other.
        decode_sequence_s: what each further sequence adds to that.
        sequences: that an engine decodes at a time.
        forward_s, update_s: a token on one rank; recomputing activations makes an update four forward passes.
        advantages_s: a token on one rank.
        sync_s: a weight sync.
        checkpoint_s: a rank's part of a checkpoint.
    """

    speed: float = 1.0
    decode_s: float = 0.008
    decode_sequence_s: float = 6e-5
    sequences: int = 256
    forward_s: float = 2 * PARAMETERS / FLOPS
    update_s: float = 8 * PARAMETERS / FLOPS
    advantages_s: float = 1e-8
    sync_s: float = 2.0
    checkpoint_s: float = 5.0

    def sleep_s(self, seconds: float) -> float:
        """What the simulation waits for so many seconds of work."""
        return seconds / self.speed

    def generation_s(self, tokens: int, running: int) -> float:
        """A response of so many tokens in an engine that decodes `running` sequences."""
        return tokens * (self.decode_s + running * self.decode_sequence_s)

    def step_s(
        self, samples: int, prompt_tokens: int, response_tokens: int, longest: int, ranks: int, engines: int
    ) -> float:
        """A whole step with everything at work all the time: the least that it can take.

        Args:
            prompt_tokens, response_tokens: of one sample, in the mean.
            longest: tokens of the longest response.
            ranks: of each role; scoring runs beside generation, critic and policy beside each other.
        """
        each = -(-samples // engines)
        full, rest = divmod(each, self.sequences)
        decoding = full * self.generation_s(response_tokens, self.sequences)
        if rest:
            decoding += self.generation_s(longest, rest)
        tokens = samples * (prompt_tokens + response_tokens)
        return max(decoding, tokens / ranks * self.forward_s) + tokens / ranks * self.update_s + self.sync_s
