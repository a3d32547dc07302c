"""A rank of a policy that learns from preferences."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import ray
import torch

from rlhf_ray.actors.answers import AnswerLogProbs
from rlhf_ray.actors.device_means import DeviceMean, MicroStats
from rlhf_ray.actors.epoch_training import EpochTrainedGroup, EpochTrainedWorker, RowPlan
from rlhf_ray.actors.group import Calls, on_all
from rlhf_ray.actors.preference_objective import Answers, label_losses, pair_losses
from rlhf_ray.actors.shards import Refs
from rlhf_ray.actors.waiting import fetch_data
from rlhf_ray.algorithms.preference.sequence import (
    length_desensitised_weights,
    sampled_alignment,
    sum_by_answer,
    wpo_weights,
)
from rlhf_ray.algorithms.preference.unpaired import kto_kl
from rlhf_ray.config.preference import Preference, TransportLoss
from rlhf_ray.config.training import Policy
from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.engines.training import full_weights
from rlhf_ray.models.answers import AnswerPack
from rlhf_ray.models.lora import adapters_off
from rlhf_ray.platform import platform, to_device
from rlhf_ray.telemetry.trace import in_span

_BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class StepContext:
    """What the losses of a step need beside its rows. References are to `AnswerLogProbs`, one for each rank.

    Attributes:
        reference: of the reference model, of the step's rows; empty when there is none.
        policy: of the policy as it is before the step, when the loss of a pair depends on the other pairs.
        mismatched: of policy and reference, of the rows' prompts with other answers, for KTO.
        shift: running mean of rewards, for BCO.
    """

    reference: Refs = ()
    policy: Refs = ()
    mismatched: tuple[Refs, Refs] = ((), ())
    shift: float = 0.0


@dataclass(frozen=True)
class LinearisedLoss:
    """Losses that depend on all pairs of a step, and their derivatives by the log-probs of each pair's answers.

    A micro-batch has some of the pairs only. In place of the losses themselves it takes what is linear in its own
    log-probs with the same derivatives, so that the sum over all micro-batches of all ranks has their gradient.

    Attributes:
        rows: place of each row.
        mean: the losses' mean over the pairs.
        chosen, rejected: derivatives of their sum, `[pairs]`.
    """

    rows: dict[int, int]
    mean: float
    chosen: torch.Tensor
    rejected: torch.Tensor

    def losses(self, rows: Sequence[int], chosen: Answers, rejected: Answers) -> torch.Tensor:
        """`[pairs]`: the mean loss, with the derivatives of the losses of the whole step."""
        places = to_device(torch.tensor([self.rows[row] for row in rows]))
        moved = [answers.logprobs - answers.logprobs.detach() for answers in (chosen, rejected)]
        return self.mean + self.chosen[places] * moved[0] + self.rejected[places] * moved[1]


class PreferenceWorker(EpochTrainedWorker):
    """One rank of the policy."""

    @in_span("load model")
    def load_model(self, policy: Policy, algorithm: Preference, total_steps: int) -> None:
        """Load the model and build its training engine; collective."""
        self.use(algorithm)
        self.load_language_model(policy, total_steps)

    def use(self, algorithm: Preference) -> None:
        """Learn by these losses."""
        self.algorithm = algorithm
        self._alone = [loss for loss in algorithm.loss if not isinstance(loss, TransportLoss)]
        self._together = [loss for loss in algorithm.loss if isinstance(loss, TransportLoss)]

    def answer_logprobs(self, data: Refs, micro_batches: Sequence[Sequence[int]]) -> AnswerLogProbs:
        """The policy's log-probs of the answers in this rank's slice of some rows."""
        [found] = fetch_data(data, "the data set")
        with self.recorder.span("log-probs"):
            return AnswerLogProbs.of(self.engine, found, micro_batches, reports=self.data_slice.reports)

    def base_logprobs(self, data: Refs, micro_batches: Sequence[Sequence[int]]) -> AnswerLogProbs:
        """The same of the policy's base model, with its adapters off: the reference of a policy with LoRA."""
        with adapters_off(self.engine.model):
            return self.answer_logprobs(data, micro_batches)

    def share_weights(self) -> list[ray.ObjectRef]:
        """Put the present weights into the object store, in buckets by name; collective, rank 0 has them."""
        with self.recorder.span("share weights"):
            refs, bucket, held = [], {}, 0
            for name, weight in full_weights(self.engine.model, _BUCKET_BYTES):
                if self.rank == 0:
                    bucket[name] = weight.detach().to("cpu", copy=True)
                    held += weight.nbytes
                if held >= _BUCKET_BYTES:
                    refs.append(ray.put(bucket))
                    bucket, held = {}, 0
            return [*refs, ray.put(bucket)] if bucket else refs

    def prepare_losses(self, data: ComparisonSet, context: StepContext) -> None:
        """Fetch what the losses take as given."""
        reference, policy, *others = map(_fetch, (context.reference, context.policy, *context.mismatched))
        kl = self._mismatched_kl(data, *others)
        self.take_as_given(data, reference, policy, kl, context.shift)

    def take_as_given(
        self,
        data: ComparisonSet,
        reference: AnswerLogProbs | None,
        policy: AnswerLogProbs | None,
        kl: float,
        shift: float,
    ) -> None:
        """What the losses of a step depend on beside the policy's present log-probs of a row.

        Args:
            reference: of the step's rows, None when there is no reference.
            policy: of all rows of the step before it, None when no loss couples them.
            kl: of KTO.
            shift: of BCO.
        """
        self._reference, self._kl, self._shift = reference, kl, shift
        self._linear = None if policy is None else self._linearised(data, policy)

    def micro_batch_loss(self, data: ComparisonSet, rows: Sequence[int]) -> tuple[torch.Tensor, MicroStats]:
        """Sum of the losses of some rows, each times the row's weight."""
        candidates = data.candidates(rows).tolist()
        pack = AnswerPack.of(data, candidates, platform().device)
        beside = "collision" if self.algorithm.weighting == "wpo" else "nothing"
        logprobs, collisions = self.engine(pack.packed, pack.positions, pack.targets, 1.0, beside)
        if not rows:
            return logprobs.sum(), {}
        answers = self._answers(data, candidates, logprobs, pack.lengths)
        weights = torch.from_numpy(data.weights[list(rows)]).to(logprobs.dtype)
        total_weight, weights = float(weights.sum()), to_device(weights)
        if self.algorithm.unpaired:
            wanted = torch.from_numpy(data.ranks[candidates] == 0)
            losses = label_losses(self.algorithm.loss, answers, to_device(wanted), self._kl, self._shift)
            stats = _label_stats(answers, wanted)
            if self.algorithm.kto is not None:
                stats["kl"] = DeviceMean(self._kl, 1.0)
        else:
            chosen, rejected = _halves(answers)
            losses = pair_losses(self._alone, chosen, rejected)
            if self._linear is not None:
                losses = losses + self._linear.losses(rows, chosen, rejected)
            if self.algorithm.weighting == "wpo":
                alignment = sampled_alignment(logprobs.detach(), collisions, pack.lengths)
                losses = losses * wpo_weights(*alignment.reshape(-1, 2).unbind(1))
            stats = _pair_stats(chosen, rejected, with_reference=self.algorithm.needs_reference)
        weighted = (losses * weights).sum()
        return weighted, {"loss": DeviceMean(weighted.detach(), total_weight), **stats}

    def _mismatched_kl(
        self, data: ComparisonSet, policy: AnswerLogProbs | None, reference: AnswerLogProbs | None
    ) -> float:
        """z0 of KTO, from the prompts of the step's rows with other answers; 0 where nothing asks for it."""
        if policy is None:
            return 0.0
        parts = (policy,) if reference is None else (policy, reference)
        sums = [float(part.values.sum(dtype="float64")) for part in parts]
        total = sums[0] - sum(sums[1:])
        self.check_finite(
            "log-ratio of mismatched answers", total, policy.candidates, lambda rows: [data.uids[row] for row in rows]
        )
        return kto_kl(total, len(policy.candidates))

    def _answers(
        self, data: ComparisonSet, candidates: Sequence[int], logprobs: torch.Tensor, lengths: torch.Tensor
    ) -> Answers:
        """Sums over the tokens of each answer; `lengths` are in host memory."""
        reference = torch.zeros_like(logprobs) if self._reference is None else self._reference.take(candidates)
        reference = to_device(reference)
        if self.algorithm.length_desensitised is not None:
            public = lengths.reshape(-1, 2).amin(1).repeat_interleave(2)
            weights = to_device(length_desensitised_weights(lengths, public, self.algorithm.length_desensitised))
            logprobs, reference = logprobs * weights, reference * weights
        return Answers(sum_by_answer(logprobs, lengths), sum_by_answer(reference, lengths), to_device(lengths))

    def _linearised(self, data: ComparisonSet, before: AnswerLogProbs) -> LinearisedLoss:
        candidates = sorted(before.candidates)
        lengths = torch.from_numpy(data.answer_lengths[candidates])
        answers = self._answers(data, candidates, to_device(before.take(candidates)), lengths)
        with torch.enable_grad():
            logprobs = answers.logprobs.detach().requires_grad_()
            total = pair_losses(self._together, *_halves(replace(answers, logprobs=logprobs))).sum()
            [gradient] = torch.autograd.grad(total, logprobs)
        rows = data.rows_of(candidates[::2])
        return LinearisedLoss(
            {row: place for place, row in enumerate(rows)},
            float(total.detach()) / len(rows),
            gradient[::2],
            gradient[1::2],
        )


class PreferenceGroup(EpochTrainedGroup[PreferenceWorker]):
    """The ranks of a policy that learns from preferences."""

    load_model = on_all(PreferenceWorker.load_model)
    share_weights = on_all(PreferenceWorker.share_weights)

    def answer_logprobs(self, plan: RowPlan) -> Calls[AnswerLogProbs]:
        """Log-probs of the answers of some rows."""
        return self.call_each(PreferenceWorker.answer_logprobs, plan)

    def base_logprobs(self, plan: RowPlan) -> Calls[AnswerLogProbs]:
        """The same with adapters off."""
        return self.call_each(PreferenceWorker.base_logprobs, plan)


def _fetch(parts: Refs) -> AnswerLogProbs | None:
    """What all ranks computed; None where nothing was asked for."""
    return AnswerLogProbs.join(fetch_data(parts, "log-probs of the answers")) if parts else None


def _halves(answers: Answers) -> tuple[Answers, Answers]:
    """Chosen and rejected answers of pairs that lie one after the other."""
    columns = (answers.logprobs, answers.reference, answers.lengths)
    chosen, rejected = zip(*(column.reshape(-1, 2).unbind(1) for column in columns), strict=True)
    return Answers(*chosen), Answers(*rejected)


def _pair_stats(chosen: Answers, rejected: Answers, *, with_reference: bool) -> dict[str, DeviceMean]:
    pairs = len(chosen.lengths)
    margins = chosen.ratios - rejected.ratios
    stats = {
        "accuracy": DeviceMean((margins > 0).sum(), pairs),
        "margin": _mean(margins),
        "chosen_logprob": _mean(chosen.means),
        "rejected_logprob": _mean(rejected.means),
    }
    if with_reference:
        stats |= {"chosen_ratio": _mean(chosen.ratios), "rejected_ratio": _mean(rejected.ratios)}
    return stats


def _label_stats(answers: Answers, wanted: torch.Tensor) -> dict[str, DeviceMean]:
    """`wanted` is in host memory, where its places can be counted without waiting."""
    places = {"wanted_ratio": wanted, "unwanted_ratio": ~wanted}
    return {name: _mean(answers.ratios[to_device(rows.nonzero()[:, 0])]) for name, rows in places.items()}


def _mean(values: torch.Tensor) -> DeviceMean:
    return DeviceMean(values.detach().sum(), len(values))
