"""How much of a role is on its devices, where roles share them."""

from enum import IntEnum


class Level(IntEnum):
    """What a role has on its devices; the rest is in host memory, or is made again."""

    OUT = 0
    """Nothing."""
    WEIGHTS = 1
    """Weights: enough to compute log-probs, and to send or receive weights."""
    FULL = 2
    """Everything: gradients and optimizer state of a trainer, KV cache of an engine."""
