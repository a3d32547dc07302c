"""From a config's list of losses to one loss per row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.algorithms.preference import margin, ratio, transport, unpaired
from rlhf_ray.algorithms.preference.divergence import ratio_scores
from rlhf_ray.algorithms.preference.odds import nll_loss, odds_ratio_loss
from rlhf_ray.config import preference as config


@dataclass(frozen=True)
class Answers:
    """One answer to each prompt of some rows.

    Attributes:
        logprobs: of the policy in nats, summed over tokens, `[rows]`.
        reference: the same of the reference; zeros when there is none.
        lengths: tokens, `[rows]`.
    """

    logprobs: Tensor
    reference: Tensor
    lengths: Tensor

    @property
    def ratios(self) -> Tensor:
        """Log-ratios of policy to reference, `[rows]`."""
        return self.logprobs - self.reference

    @property
    def means(self) -> Tensor:
        """Log-probs of the policy per token, `[rows]`."""
        return self.logprobs / self.lengths


def pair_losses(losses: Sequence[config.PreferenceLoss], chosen: Answers, rejected: Answers) -> Tensor:
    """Weighted sum of the losses of each pair, `[pairs]`; `aot` takes these pairs for the whole optimizer step."""
    total = torch.zeros_like(chosen.logprobs)
    for loss in losses:
        total = total + loss.weight * _pair_loss(loss, chosen, rejected)
    return total


def label_losses(
    losses: Sequence[config.PreferenceLoss], answers: Answers, wanted: Tensor, kl: float, shift: float
) -> Tensor:
    """Weighted sum of the losses of each labelled answer, `[rows]`.

    Args:
        wanted: bool `[rows]`.
        kl: of KTO, from mismatched prompts and answers.
        shift: of BCO, the running mean of rewards.
    """
    total = torch.zeros_like(answers.logprobs)
    for loss in losses:
        match loss:
            case config.KTOLoss():
                value = unpaired.kto_loss(
                    answers.ratios, wanted, kl, loss.beta, loss.desirable_weight, loss.undesirable_weight
                )
            case config.BCOLoss():
                value = unpaired.bco_loss(answers.ratios, wanted, shift, loss.beta)
            case _:
                raise TypeError(f"{loss.type} is no loss of single answers")
        total = total + loss.weight * value
    return total


def _pair_loss(loss: config.PreferenceLoss, chosen: Answers, rejected: Answers) -> Tensor:
    match loss:
        case config.SigmoidLoss():
            return margin.sigmoid_loss(_margins(loss, chosen, rejected), loss.beta, loss.label_smoothing)
        case config.FlippedLoss():
            flipped = {"robust": margin.robust_loss, "exo": margin.exo_loss}[loss.type]
            return flipped(_margins(loss, chosen, rejected), loss.beta, loss.label_smoothing)
        case config.HingeLoss():
            return margin.hinge_loss(_margins(loss, chosen, rejected), loss.beta)
        case config.DiscoPOPLoss():
            return margin.discopop_loss(_margins(loss, chosen, rejected), loss.beta, loss.tau)
        case config.IPOLoss():
            return margin.ipo_loss(_token_margins(chosen, rejected), loss.tau)
        case config.NormalisedLoss():
            return margin.sigmoid_loss(_token_margins(chosen, rejected), loss.beta, loss.label_smoothing)
        case config.RatioLoss():
            by_ratio = {
                "nca": ratio.nca_loss,
                "sppo": ratio.sppo_loss,
                "apo_zero": ratio.apo_zero_loss,
                "apo_down": ratio.apo_down_loss,
            }[loss.type]
            return by_ratio(chosen.ratios, rejected.ratios, loss.beta)
        case config.TransportLoss(type="aot"):
            policy_margins, reference_margins = (
                chosen.logprobs - rejected.logprobs,
                chosen.reference - rejected.reference,
            )
            return transport.aot_paired_loss(policy_margins, reference_margins, loss.beta, loss.label_smoothing)
        case config.TransportLoss():
            return transport.aot_unpaired_loss(chosen.ratios, rejected.ratios, loss.beta, loss.label_smoothing)
        case config.SimPOLoss():
            return margin.simpo_loss(chosen.means, rejected.means, loss.beta, loss.gamma, loss.label_smoothing)
        case config.CPOLoss():
            preferred = margin.sigmoid_loss(chosen.logprobs - rejected.logprobs, loss.beta, loss.label_smoothing)
            return preferred + loss.nll_weight * nll_loss(chosen.logprobs, chosen.lengths)
        case config.ORPOLoss():
            likely = nll_loss(chosen.logprobs, chosen.lengths)
            return likely + loss.beta * odds_ratio_loss(chosen.means, rejected.means)
        case config.NLLLoss():
            return nll_loss(chosen.logprobs, chosen.lengths)
        case _:
            raise TypeError(f"{loss.type} is no loss of pairs")


def _margins(
    loss: config.SigmoidLoss | config.FlippedLoss | config.HingeLoss | config.DiscoPOPLoss,
    chosen: Answers,
    rejected: Answers,
) -> Tensor:
    scores = [ratio_scores(answers.ratios, loss.divergence, loss.divergence_alpha) for answers in (chosen, rejected)]
    return scores[0] - scores[1]


def _token_margins(chosen: Answers, rejected: Answers) -> Tensor:
    return chosen.ratios / chosen.lengths - rejected.ratios / rejected.lengths
