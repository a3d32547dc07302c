"""Raw scores of a step into the scores that are optimised: normalised, clipped, penalised."""

import math
from typing import TypedDict

import torch
from torch import Tensor

from rlhf_ray.algorithms.checks import check_like, check_option, check_vectors
from rlhf_ray.algorithms.errors import SampleError
from rlhf_ray.algorithms.moments import Moments, MomentsState, whiten


class ScoreShaperState(TypedDict):
    """What a checkpoint keeps of a `ScoreShaper`."""

    moments: MomentsState


class ScoreShaper:
    """Shapes the scores of a step, in this order:

        1. running normalisation (optional): s <- (s - mean) / sqrt(variance + 1e-8), moments over all scores seen so
           far, those of this step included
        2. clipping (optional): s <- clip(s, -score_clip, score_clip)
        3. truncated responses: s <- s - truncation_penalty

    The penalty comes last, so that neither the clip nor the running statistics can absorb it.

    Source: running reward normalisation as in Engstrom et al. 2020, "Implementation Matters in Deep Policy Gradients",
    arXiv:2005.12729, section 3, there by the deviation only; a fixed penalty for responses that do not end as in
    Ziegler et al. 2019, arXiv:1909.08593.

    Args:
        normalize: whether to normalise by running moments.
        score_clip: bound of the absolute score, above 0; None for no clipping.
        truncation_penalty: at least 0, in the units of the clipped score.

    Raises:
        OptionError: a value out of range.
    """

    def __init__(
        self, *, normalize: bool = False, score_clip: float | None = None, truncation_penalty: float = 0.0
    ) -> None:
        if score_clip is not None:
            check_option("score_clip", score_clip, score_clip > 0, "above 0, or None")
        check_option(
            "truncation_penalty", truncation_penalty, 0 <= truncation_penalty < math.inf, "finite and at least 0"
        )
        self.normalize = normalize
        self.score_clip = score_clip
        self.truncation_penalty = truncation_penalty
        self.moments = Moments()

    def shape(self, scores: Tensor, truncated: Tensor) -> Tensor:
        """Shape the scores of one step, and take them into the running moments when normalising.

        Args:
            scores: `[samples]`, all samples of the step, because the moments are updated first.
            truncated: bool `[samples]`, whether the response hit the token limit.

        Returns:
            `[samples]`, same dtype as scores.

        Raises:
            TensorInputError: shapes or dtypes do not fit.
            SampleError: a score is NaN or infinite; the running moments are then unchanged.
        """
        check_vectors(scores=scores)
        check_like("truncated", truncated, scores, torch.bool)
        bad = torch.nonzero(~torch.isfinite(scores)).flatten().tolist()
        if bad:
            raise SampleError(bad, "have a score that is NaN or infinite", "check the reward that scored them")
        if scores.numel() == 0:
            return scores
        if self.normalize:
            self.moments = self.moments.merge(Moments.of(scores))
            scores = whiten(scores, self.moments)
        if self.score_clip is not None:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        return scores - self.truncation_penalty * truncated.to(scores.dtype)

    def state_dict(self) -> ScoreShaperState:
        """The running moments; the options belong to the config."""
        return {"moments": self.moments.state_dict()}

    def load_state_dict(self, state: ScoreShaperState) -> None:
        """Continue with the running moments of `state`."""
        self.moments = Moments.from_state(state["moments"])
