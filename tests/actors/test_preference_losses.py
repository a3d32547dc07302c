"""Losses of preference learning on packed answers, against padded forward passes and loops in float64."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.actors.answers import AnswerLogProbs
from rlhf_ray.actors.preference import PreferenceWorker
from rlhf_ray.config.preference import Preference
from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.data.trajectory import offsets_of
from rlhf_ray.models.answers import AnswerPack
from rlhf_ray.models.heads import load_causal
from rlhf_ray.models.role_models import CausalModel

PAIRS = 6
VOCABULARY = 512


def comparisons(candidates: int, seed: int = 0) -> ComparisonSet:
    """Random rows of so many candidates, each with a prompt of its own."""
    random = np.random.default_rng(seed)
    texts, starts = [], []
    for _ in range(PAIRS):
        prompt = random.integers(3, VOCABULARY, random.integers(1, 9))
        for _ in range(candidates):
            texts.append(np.concatenate([prompt, random.integers(3, VOCABULARY, random.integers(1, 12))]))
            starts.append(len(prompt))
    labels = random.permutation(np.arange(PAIRS) % 2) if candidates == 1 else np.tile([0, 1], PAIRS)
    return ComparisonSet(
        uids=tuple(f"row-{row}" for row in range(PAIRS)),
        token_ids=np.concatenate(texts).astype(np.int32),
        token_offsets=offsets_of([len(text) for text in texts]),
        answer_starts=np.array(starts),
        candidate_offsets=np.arange(0, len(texts) + 1, candidates),
        ranks=labels,
        margins=np.zeros(PAIRS, np.float32),
        weights=np.array([1.0, 0.5, 2.0, 1.0, 1.0, 0.25]),
        dropped=0,
        truncated=0,
    )


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> CausalModel:
    return load_causal(str(tiny_model_dir), dtype=torch.float32, vocab_chunk_tokens=7)


def reference_of(data: ComparisonSet, seed: int = 1) -> AnswerLogProbs:
    """Some log-probs as a reference could have given them."""
    lengths = data.answer_lengths
    values = -6 - np.random.default_rng(seed).random(lengths.sum(), dtype=np.float32)
    return AnswerLogProbs(tuple(range(len(lengths))), offsets_of(lengths), values)


def worker_of(model: CausalModel, loss: Sequence[dict[str, Any]], **algorithm: Any) -> PreferenceWorker:
    """A rank without actor and DeepSpeed: the model itself stands where the engine would."""
    worker = PreferenceWorker.__new__(PreferenceWorker)
    worker.use(Preference.model_validate({"loss": list(loss), **algorithm}))
    worker.engine = model  # type: ignore[assignment]
    return worker


def padded_logprobs(folder: Path, data: ComparisonSet) -> list[list[float]]:
    """Log-probs of each answer's tokens from transformers' own padded forward pass, all logits in float64."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return [answer.tolist() for answer in answer_logprobs(theirs, data)]


def answer_logprobs(theirs: Any, data: ComparisonSet) -> list[torch.Tensor]:
    """Log-probs of each answer's tokens, padded."""
    texts = [data.tokens(candidate) for candidate in range(len(data.answer_starts))]
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.from_numpy(text.astype(np.int64)), 1
    log_p = theirs(ids, attention_mask=mask).logits.double().log_softmax(-1)
    return [
        log_p[row, start - 1 : len(text) - 1].gather(-1, ids[row, start : len(text), None])[:, 0]
        for row, (text, start) in enumerate(zip(texts, data.answer_starts, strict=True))
    ]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


Pair = dict[str, float]
"""c, r: log-probs of chosen and rejected answer; C, R: of the reference; n, m: their lengths."""

SIGMOID = {"type": "sigmoid", "beta": 0.3}

# Each loss as its paper writes it, on one pair.
PAIR_LOSSES: list[tuple[dict[str, Any], Callable[[Pair], float]]] = [
    (SIGMOID, lambda p: -math.log(sigmoid(0.3 * ((p["c"] - p["C"]) - (p["r"] - p["R"]))))),
    (
        {**SIGMOID, "label_smoothing": 0.2},
        lambda p: -0.8 * math.log(sigmoid(0.3 * margin(p))) - 0.2 * math.log(sigmoid(-0.3 * margin(p))),
    ),
    (
        {"type": "robust", "beta": 0.3, "label_smoothing": 0.2},
        lambda p: (
            (-0.8 * math.log(sigmoid(0.3 * margin(p))) + 0.2 * math.log(sigmoid(-0.3 * margin(p)))) / (1 - 2 * 0.2)
        ),
    ),
    (
        {"type": "exo", "beta": 0.3, "label_smoothing": 0.2},
        lambda p: sum(
            sigmoid(sign * 0.3 * margin(p)) * (math.log(sigmoid(sign * 0.3 * margin(p))) - math.log(target))
            for sign, target in ((1, 0.8), (-1, 0.2))
        ),
    ),
    ({"type": "hinge", "beta": 0.3}, lambda p: max(0.0, 1 - 0.3 * margin(p))),
    (
        {"type": "discopop", "beta": 0.3},
        lambda p: (
            -math.log(sigmoid(0.3 * margin(p))) * (1 - sigmoid(0.3 * margin(p) / 0.05))
            + math.exp(-0.3 * margin(p)) * sigmoid(0.3 * margin(p) / 0.05)
        ),
    ),
    ({"type": "ipo", "tau": 0.4}, lambda p: (token_margin(p) - 1 / (2 * 0.4)) ** 2),
    ({"type": "sigmoid_norm", "beta": 1.7}, lambda p: -math.log(sigmoid(1.7 * token_margin(p)))),
    (
        {"type": "nca", "beta": 0.3},
        lambda p: (
            -math.log(sigmoid(0.3 * (p["c"] - p["C"])))
            - 0.5 * math.log(sigmoid(-0.3 * (p["c"] - p["C"])))
            - 0.5 * math.log(sigmoid(-0.3 * (p["r"] - p["R"])))
        ),
    ),
    (
        {"type": "sppo", "beta": 0.3},
        lambda p: (p["c"] - p["C"] - 0.5 / 0.3) ** 2 + (p["r"] - p["R"] + 0.5 / 0.3) ** 2,
    ),
    (
        {"type": "apo_zero", "beta": 0.3},
        lambda p: 1 - sigmoid(0.3 * (p["c"] - p["C"])) + sigmoid(0.3 * (p["r"] - p["R"])),
    ),
    ({"type": "apo_down", "beta": 0.3}, lambda p: sigmoid(0.3 * (p["c"] - p["C"])) + 1 - sigmoid(0.3 * margin(p))),
    (
        {"type": "simpo", "beta": 2.0, "gamma": 0.5},
        lambda p: -math.log(sigmoid(2.0 * (p["c"] / p["n"] - p["r"] / p["m"]) - 0.5)),
    ),
    (
        {"type": "cpo", "beta": 0.3, "nll_weight": 0.7},
        lambda p: -math.log(sigmoid(0.3 * (p["c"] - p["r"]))) - 0.7 * p["c"] / p["n"],
    ),
    (
        {"type": "orpo", "beta": 0.3},
        lambda p: -p["c"] / p["n"] - 0.3 * math.log(sigmoid(log_odds(p["c"] / p["n"]) - log_odds(p["r"] / p["m"]))),
    ),
    ({"type": "nll"}, lambda p: -p["c"] / p["n"]),
    (
        {**SIGMOID, "divergence": "forward_kl"},
        lambda p: -math.log(sigmoid(0.3 * (math.exp(p["R"] - p["r"]) - math.exp(p["C"] - p["c"])))),
    ),
    (
        {**SIGMOID, "divergence": "js"},
        lambda p: (
            -math.log(
                sigmoid(
                    0.3
                    * sum(
                        sign * math.log(2 * math.exp(ratio) / (1 + math.exp(ratio)))
                        for sign, ratio in ((1, p["c"] - p["C"]), (-1, p["r"] - p["R"]))
                    )
                )
            )
        ),
    ),
    (
        {**SIGMOID, "divergence": "alpha", "divergence_alpha": 0.5},
        lambda p: (
            -math.log(
                sigmoid(
                    0.3
                    * sum(
                        sign * (1 - math.exp(-0.5 * ratio)) / 0.5
                        for sign, ratio in ((1, p["c"] - p["C"]), (-1, p["r"] - p["R"]))
                    )
                )
            )
        ),
    ),
]


def margin(p: Pair) -> float:
    return (p["c"] - p["C"]) - (p["r"] - p["R"])


def token_margin(p: Pair) -> float:
    return (p["c"] - p["C"]) / p["n"] - (p["r"] - p["R"]) / p["m"]


def log_odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


def pairs_of(data: ComparisonSet, logprobs: list[list[float]], reference: AnswerLogProbs) -> list[Pair]:
    def summed(candidate: int) -> tuple[float, float, int]:
        start, end = reference.offsets[candidate : candidate + 2]
        return sum(logprobs[candidate]), float(reference.values[start:end].sum(dtype=np.float64)), end - start

    pairs = []
    for row in range(len(data)):
        (c, big_c, n), (r, big_r, m) = summed(2 * row), summed(2 * row + 1)
        pairs.append({"c": c, "r": r, "C": big_c, "R": big_r, "n": n, "m": m})
    return pairs


@pytest.mark.parametrize(
    ("loss", "formula"), PAIR_LOSSES, ids=["-".join(map(str, loss.values())) for loss, _ in PAIR_LOSSES]
)
def test_a_packed_batch_has_the_loss_of_the_padded_one(
    loss: dict[str, Any], formula: Callable[[Pair], float], model: CausalModel, tiny_model_dir: Path
) -> None:
    data = comparisons(2)
    reference = reference_of(data)
    worker = worker_of(model, [loss])
    worker.take_as_given(data, reference, None, 0.0, 0.0)
    total, stats = worker.micro_batch_loss(data, range(PAIRS))
    pairs = pairs_of(data, padded_logprobs(tiny_model_dir, data), reference)
    wanted = [weight * formula(pair) for weight, pair in zip(data.weights, pairs, strict=True)]
    assert float(total.detach()) == pytest.approx(sum(wanted), rel=2e-4)
    assert stats["loss"].value == pytest.approx(sum(wanted) / data.weights.sum(), rel=2e-4)
    assert stats["accuracy"].value == sum(margin(pair) > 0 for pair in pairs) / PAIRS
    assert stats["margin"].value == pytest.approx(sum(map(margin, pairs)) / PAIRS, abs=1e-3)


def test_a_prompt_that_is_computed_once_for_both_answers_has_the_gradient_of_the_padded_batch(
    model: CausalModel, tiny_model_dir: Path
) -> None:
    data = comparisons(2)
    reference = reference_of(data)
    worker = worker_of(model, [SIGMOID])
    worker.take_as_given(data, reference, None, 0.0, 0.0)
    pack = AnswerPack.of(data, range(2 * PAIRS), torch.device("cpu"))
    assert pack.packed.input_ids.numel() == len(data.token_ids) - data.answer_starts[::2].sum()
    model.zero_grad()
    worker.micro_batch_loss(data, range(PAIRS))[0].backward()

    theirs = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    sums = torch.stack([answer.sum() for answer in answer_logprobs(theirs, data)])
    ratios = sums - torch.from_numpy(np.add.reduceat(reference.values.astype(np.float64), reference.offsets[:-1]))
    losses = -torch.nn.functional.logsigmoid(0.3 * (ratios[::2] - ratios[1::2]))
    (losses * torch.from_numpy(data.weights)).sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in model.model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-5)


def test_answers_to_different_prompts_share_nothing(model: CausalModel) -> None:
    data = comparisons(2)
    pack = AnswerPack.of(data, [0, 3, 2, 1], torch.device("cpu"))
    assert pack.packed.prefixes == ((0, 0), (0, 0), (len(data.tokens(0)), int(data.answer_starts[3])), (0, 0))


def test_losses_add_up_by_their_weights(model: CausalModel) -> None:
    data = comparisons(2)

    def total(*losses: dict[str, Any]) -> float:
        worker = worker_of(model, losses)
        worker.take_as_given(data, reference_of(data), None, 0.0, 0.0)
        return float(worker.micro_batch_loss(data, range(PAIRS))[0])

    apart = 0.25 * total(SIGMOID) + 3 * total({"type": "nll"})
    assert total({**SIGMOID, "weight": 0.25}, {"type": "nll", "weight": 3}) == pytest.approx(apart, rel=1e-5)


def gradient(model: CausalModel, worker: PreferenceWorker, data: ComparisonSet, cuts: Sequence[int]) -> torch.Tensor:
    """Of the whole step, cut into micro-batches."""
    model.zero_grad()
    for rows in np.split(np.arange(PAIRS), cuts):
        worker.micro_batch_loss(data, rows.tolist())[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("losses", "algorithm"),
    [
        ([SIGMOID], {}),
        ([SIGMOID], {"weighting": "wpo"}),
        ([SIGMOID], {"length_desensitised": 0.3}),
        ([{"type": "aot", "beta": 0.3}], {}),
        ([{"type": "aot_unpaired", "beta": 0.3}, {**SIGMOID, "weight": 0.5}], {}),
    ],
)
def test_the_gradient_of_a_step_does_not_depend_on_its_micro_batches(
    losses: list[dict[str, Any]], algorithm: dict[str, Any], model: CausalModel
) -> None:
    data = comparisons(2)
    worker = worker_of(model, losses, **algorithm)
    before = before_the_step(worker, data, parts=[[0, 4, 5], [1, 2, 3]])
    worker.take_as_given(data, reference_of(data), before if worker.algorithm.couples_rows else None, 0.0, 0.0)
    whole = gradient(model, worker, data, [])
    torch.testing.assert_close(gradient(model, worker, data, [1, 2, 5]), whole, rtol=1e-4, atol=1e-6)


def before_the_step(worker: PreferenceWorker, data: ComparisonSet, parts: Sequence[Sequence[int]]) -> AnswerLogProbs:
    """What the ranks give of the policy's log-probs, each of its part of the rows."""
    with torch.no_grad():
        return AnswerLogProbs.join([AnswerLogProbs.of(worker.engine, data, [rows]) for rows in parts])


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_losses_that_couple_all_pairs_have_the_gradient_of_the_sorted_batch(kind: str, model: CausalModel) -> None:
    data = comparisons(2)
    data = ComparisonSet(**{**vars(data), "weights": np.ones(PAIRS)})
    reference = reference_of(data)
    worker = worker_of(model, [{"type": kind, "beta": 0.3}])
    worker.take_as_given(data, reference, before_the_step(worker, data, [range(PAIRS)]), 0.0, 0.0)
    found = gradient(model, worker, data, [2])

    model.zero_grad()
    live = summed_logprobs(worker, data)
    c, r = live[::2], live[1::2]
    theirs = np.add.reduceat(reference.values.astype(np.float64), reference.offsets[:-1])
    big_c, big_r = torch.from_numpy(theirs[::2]), torch.from_numpy(theirs[1::2])
    high, low = ((c - r), (big_c - big_r)) if kind == "aot" else ((c - big_c), (r - big_r))
    wanted = -torch.nn.functional.logsigmoid(0.3 * (high.sort().values - low.sort().values)).sum()
    wanted.backward()
    direct = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, direct, rtol=1e-4, atol=1e-6)
    total, _ = worker.micro_batch_loss(data, range(PAIRS))
    assert float(total) == pytest.approx(float(wanted), rel=1e-5)


def summed_logprobs(worker: PreferenceWorker, data: ComparisonSet) -> torch.Tensor:
    """Sums over the tokens of each answer with their gradient, one answer after the other."""
    pack = AnswerPack.of(data, range(2 * PAIRS), torch.device("cpu"))
    logprobs = worker.engine(pack.packed, pack.positions, pack.targets, 1.0)[0].double()
    return torch.stack([part.sum() for part in logprobs.split(pack.lengths.tolist())])


@pytest.mark.parametrize(("kind", "kl", "shift"), [("kto", 0.7, 0.0), ("bco", 0.0, -0.4)])
def test_labelled_answers_have_the_loss_of_the_padded_batch(
    kind: str, kl: float, shift: float, model: CausalModel, tiny_model_dir: Path
) -> None:
    data = comparisons(1)
    reference = reference_of(data)
    worker = worker_of(model, [{"type": kind, "beta": 0.3}])
    worker.take_as_given(data, reference, None, kl, shift)
    total, stats = worker.micro_batch_loss(data, range(PAIRS))
    logprobs = padded_logprobs(tiny_model_dir, data)
    ratios = [
        sum(own) - float(reference.values[reference.offsets[row] : reference.offsets[row + 1]].sum(dtype=np.float64))
        for row, own in enumerate(logprobs)
    ]

    def formula(ratio: float, label: int) -> float:
        sign = 1 if label == 0 else -1
        if kind == "kto":
            return 1 - sigmoid(sign * 0.3 * (ratio - kl))
        return -math.log(sigmoid(sign * (0.3 * ratio - shift)))

    wanted = sum(w * formula(*pair) for w, pair in zip(data.weights, zip(ratios, data.ranks, strict=True), strict=True))
    assert float(total) == pytest.approx(wanted, rel=2e-4)
    assert stats["wanted_ratio"].value == pytest.approx(np.mean(np.array(ratios)[data.ranks == 0]), rel=1e-4)


def test_length_desensitising_counts_the_longer_answers_tail_less(model: CausalModel, tiny_model_dir: Path) -> None:
    data = comparisons(2)
    reference = reference_of(data)
    worker = worker_of(model, [SIGMOID], length_desensitised=0.25)
    worker.take_as_given(data, reference, None, 0.0, 0.0)
    total, _ = worker.micro_batch_loss(data, range(PAIRS))
    logprobs = padded_logprobs(tiny_model_dir, data)
    wanted = 0.0
    for row in range(PAIRS):
        public = min(len(logprobs[2 * row]), len(logprobs[2 * row + 1]))
        sums = []
        for candidate in (2 * row, 2 * row + 1):
            own = logprobs[candidate]
            start = reference.offsets[candidate]
            theirs = reference.values[start : start + len(own)].astype(np.float64)
            ratios = [a - b for a, b in zip(own, theirs, strict=True)]
            sums.append(sum(ratios[:public]) + 0.25 * sum(ratios[public:]))
        wanted -= data.weights[row] * math.log(sigmoid(0.3 * (sums[0] - sums[1])))
    assert float(total) == pytest.approx(wanted, rel=2e-4)


def test_without_a_reference_log_probs_stand_where_log_ratios_would(model: CausalModel, tiny_model_dir: Path) -> None:
    data = comparisons(2)
    worker = worker_of(model, [SIGMOID], reference_free=True)
    worker.take_as_given(data, None, None, 0.0, 0.0)
    total, stats = worker.micro_batch_loss(data, range(PAIRS))
    sums = [sum(own) for own in padded_logprobs(tiny_model_dir, data)]
    wanted = [-math.log(sigmoid(0.3 * (c - r))) for c, r in zip(sums[::2], sums[1::2], strict=True)]
    assert float(total) == pytest.approx(float(np.dot(wanted, data.weights)), rel=2e-4)
    assert "chosen_ratio" not in stats


def test_an_empty_micro_batch_adds_nothing(model: CausalModel) -> None:
    data = comparisons(2)
    worker = worker_of(model, [SIGMOID])
    worker.take_as_given(data, reference_of(data), None, 0.0, 0.0)
    loss, stats = worker.micro_batch_loss(data, [])
    assert float(loss) == 0
    assert stats == {}
    loss.backward()
