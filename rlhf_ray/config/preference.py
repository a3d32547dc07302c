"""The losses of offline preference learning. Each type has a section with what its loss reads and nothing else."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, model_validator

from rlhf_ray.config.base import Fraction, NonNegativeFloat, PositiveFloat, PositiveFraction, Section

Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
PositiveSmoothing = Annotated[float, Field(gt=0, lt=0.5)]


class _Loss(Section):
    weight: float = 1.0
    """Factor in the sum of losses."""


class _ScaledLoss(_Loss):
    beta: PositiveFloat = 0.1
    """How closely the policy is held to the reference: larger is closer."""


class _SmoothedLoss(_ScaledLoss):
    label_smoothing: Smoothing = 0.0
    """Share of the pairs whose label is taken to be wrong."""


class _MarginLoss(_ScaledLoss):
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """What holds the policy to the reference; `js` is the Jensen–Shannon divergence, `alpha` the α-divergence."""
    divergence_alpha: PositiveFloat = 1.0
    """α of `divergence: alpha`."""

    @model_validator(mode="after")
    def _alpha_has_its_divergence(self) -> "_MarginLoss":
        if self.divergence_alpha != 1.0 and self.divergence != "alpha":
            raise ValueError(f".divergence_alpha is only read with .divergence: alpha, but it is {self.divergence!r}")
        return self


class SigmoidLoss(_MarginLoss):
    """DPO: the log-likelihood that the chosen answer wins."""

    type: Literal["sigmoid"]
    """The loss."""
    label_smoothing: Smoothing = 0.0
    """Share of the pairs whose label is taken to be wrong (conservative DPO)."""


class FlippedLoss(_MarginLoss):
    """Losses that need a share of wrong labels: `robust` is unbiased when labels are flipped at that rate; `exo` fits
    the policy to the smoothed preference by the reverse KL."""

    type: Literal["robust", "exo"]
    """The loss."""
    label_smoothing: PositiveSmoothing
    """Share of the pairs whose label is taken to be wrong."""


class HingeLoss(_MarginLoss):
    """SLiC-HF's and RSO's hinge."""

    type: Literal["hinge"]
    """The loss."""


class DiscoPOPLoss(_MarginLoss):
    """The log-ratio modulated loss that a language model discovered."""

    type: Literal["discopop"]
    """The loss."""
    tau: PositiveFraction = 0.05
    """Temperature of the modulation between the logistic and the exponential loss."""


class IPOLoss(_Loss):
    """IPO: a squared error on the margin of log-ratios per token."""

    type: Literal["ipo"]
    """The loss."""
    tau: PositiveFloat = 0.1
    """How closely the policy is held to the reference: the margin aims at 1/(2·tau)."""


class NormalisedLoss(_SmoothedLoss):
    """DPO on log-ratios per token, so that length is no advantage."""

    type: Literal["sigmoid_norm"]
    """The loss."""
    beta: PositiveFloat = 2.0
    """How closely the policy is held to the reference: larger is closer."""


class RatioLoss(_ScaledLoss):
    """Losses that look at each answer's log-ratio for itself: noise contrastive alignment (`nca`), self-play preference
    optimisation (`sppo`), anchored preference optimisation for a policy that is worse (`apo_zero`) or better
    (`apo_down`) than the chosen answers."""

    type: Literal["nca", "sppo", "apo_zero", "apo_down"]
    """The loss."""


class TransportLoss(_SmoothedLoss):
    """Alignment via optimal transport: the whole distribution of chosen answers against that of the rejected ones, over
    an optimizer step. `aot` compares pairs, `aot_unpaired` chosen with rejected answers of any prompts."""

    type: Literal["aot", "aot_unpaired"]
    """The loss."""


class SimPOLoss(_SmoothedLoss):
    """SimPO: log-probs per token, without a reference, and a target margin."""

    type: Literal["simpo"]
    """The loss."""
    beta: PositiveFloat = 2.0
    """Scale of the margin."""
    gamma: NonNegativeFloat = 1.0
    """Target of the scaled margin."""


class CPOLoss(_SmoothedLoss):
    """CPO: DPO without a reference, and the negative log-likelihood of the chosen answer."""

    type: Literal["cpo"]
    """The loss."""
    beta: PositiveFloat = 0.1
    """Scale of the margin."""
    nll_weight: NonNegativeFloat = 1.0
    """Weight of the negative log-likelihood per token of the chosen answer."""


class ORPOLoss(_Loss):
    """ORPO: the negative log-likelihood of the chosen answer and the log odds ratio."""

    type: Literal["orpo"]
    """The loss."""
    beta: PositiveFloat = 0.1
    """Weight of the odds ratio (λ in the paper)."""


class NLLLoss(_Loss):
    """Negative log-likelihood per token of the chosen answer, a term beside others."""

    type: Literal["nll"]
    """The loss."""


class KTOLoss(_ScaledLoss):
    """KTO: single answers with a label, against the KL of mismatched prompts and answers."""

    type: Literal["kto"]
    """The loss."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of wanted answers; with many unwanted ones raise it until both kinds weigh about the same."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of unwanted answers."""


class BCOLoss(_ScaledLoss):
    """BCO: a classifier of single answers whose logit is the implicit reward less its running mean."""

    type: Literal["bco"]
    """The loss."""


UnpairedLoss = KTOLoss | BCOLoss

PreferenceLoss = Annotated[
    SigmoidLoss
    | FlippedLoss
    | HingeLoss
    | DiscoPOPLoss
    | IPOLoss
    | NormalisedLoss
    | RatioLoss
    | TransportLoss
    | SimPOLoss
    | CPOLoss
    | ORPOLoss
    | NLLLoss
    | KTOLoss
    | BCOLoss,
    Discriminator("type"),
]

# Losses that compare nothing with a reference.
_WITHOUT_REFERENCE = (SimPOLoss, CPOLoss, ORPOLoss, NLLLoss)
# Losses that are not made of sums over the answers of a pair alone.
_NOT_OF_SUMS = (IPOLoss, NormalisedLoss, SimPOLoss, CPOLoss, ORPOLoss, NLLLoss, KTOLoss, BCOLoss)


class Preference(Section):
    """The algorithm: a sum of losses and what bends them."""

    loss: tuple[PreferenceLoss, ...] = (SigmoidLoss(type="sigmoid"),)
    """Losses that are added up. `kto` and `bco` need labels of single answers, the others pairs."""
    reference_free: bool = False
    """Take the reference for uniform: log-probs stand where log-ratios would, and no reference model is loaded."""
    length_desensitised: Fraction | None = None
    """LD-DPO: tokens past the length of the shorter answer count this much; 1 is plain DPO."""
    weighting: Literal["none", "wpo"] = "none"
    """`wpo` weights each pair by how likely the policy is to write it, as WPO does for off-policy data."""

    @property
    def unpaired(self) -> bool:
        """Whether the losses are of single answers."""
        return isinstance(self.loss[0], UnpairedLoss)

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model is compared with."""
        return not self.reference_free and not all(isinstance(loss, _WITHOUT_REFERENCE) for loss in self.loss)

    @property
    def couples_rows(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of the optimizer step."""
        return any(isinstance(loss, TransportLoss) for loss in self.loss)

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what an evaluation gives."""
        if self.unpaired:
            return ("loss", "wanted_ratio", "unwanted_ratio")
        ratios = ("chosen_ratio", "rejected_ratio") if self.needs_reference else ()
        return ("loss", "accuracy", "margin", "chosen_logprob", "rejected_logprob", *ratios)

    @property
    def kto(self) -> KTOLoss | None:
        """The loss that needs mismatched prompts and answers."""
        return next((loss for loss in self.loss if isinstance(loss, KTOLoss)), None)

    @property
    def bco(self) -> BCOLoss | None:
        """The loss that needs a running mean of rewards."""
        return next((loss for loss in self.loss if isinstance(loss, BCOLoss)), None)

    @model_validator(mode="after")
    def _losses_fit(self) -> "Preference":
        if not self.loss:
            raise ValueError(".loss is empty, but needs at least one entry")
        if not any(loss.weight for loss in self.loss):
            raise ValueError("every .loss.N.weight is 0: there is nothing to learn")
        for index, loss in enumerate(self.loss):
            if isinstance(loss, UnpairedLoss) != self.unpaired:
                raise ValueError(
                    f".loss.0 ({self.loss[0].type}) and .loss.{index} ({loss.type}) learn from different data: kto and "
                    "bco from labels of single answers, the others from pairs"
                )
            if [other.type for other in self.loss[:index]].count(loss.type) and isinstance(loss, UnpairedLoss):
                raise ValueError(f".loss.{index} is a second {loss.type}: one is enough")
            if self.length_desensitised is not None and isinstance(loss, _NOT_OF_SUMS):
                raise ValueError(
                    f".length_desensitised shortens sums over the longer answer of a pair, but .loss.{index} "
                    f"({loss.type}) is not made of such sums alone"
                )
        if self.weighting == "wpo" and self.unpaired:
            raise ValueError(f".weighting: wpo weights pairs, but .loss.0 is {self.loss[0].type}")
        if self.weighting == "wpo" and self.couples_rows:
            raise ValueError(".weighting: wpo weights pairs one by one, but aot sorts all pairs of a step")
        if self.reference_free and all(isinstance(loss, _WITHOUT_REFERENCE) for loss in self.loss):
            raise ValueError(f".reference_free has no effect: .loss.0 ({self.loss[0].type}) has no reference anyway")
        return self
