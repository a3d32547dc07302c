"""What a reward model learns from a row of candidates. Each loss is a section with the keys that it reads."""

from typing import Annotated, Literal

from pydantic import Field

from rlhf_ray.config.base import NonNegativeFloat, Section


class BradleyTerry(Section):
    """Pairs: −log σ(score of the chosen text − score of the rejected one − margin). A tie is a label of one half."""

    type: Literal["bradley_terry"]
    """The loss."""
    margin: NonNegativeFloat = 0.0
    """Factor of a row's margin, where the data have one: the chosen text is to score higher by so much more. 1 is Llama
    2's loss; 0 leaves margins to the report."""
    centering: NonNegativeFloat = 0.0
    """Factor of (score of the chosen text + score of the rejected one)², which keeps scores around 0. 0.01 is usual."""


class Softmax(Section):
    """Rows of k candidates with a best one: −log of its softmax. The order of the others is not looked at."""

    type: Literal["softmax"]
    """The loss."""


class PlackettLuce(Section):
    """Rankings: the best is chosen from all, the second from the rest, and so on. Ties by Breslow's approximation."""

    type: Literal["plackett_luce"]
    """The loss."""


class AllPairs(Section):
    """Rankings: mean of the Bradley–Terry losses of all pairs of a row, so that each row counts once."""

    type: Literal["all_pairs"]
    """The loss."""


RewardLoss = Annotated[BradleyTerry | Softmax | PlackettLuce | AllPairs, Field(discriminator="type")]
