"""The gradient of an optimizer step is that of its loss, however the step is cut into micro-batches and ranks."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.aggregation import AggregationMode, token_weights
from rlhf_ray.algorithms.policy_loss import PolicyLossInputs, PolicyLossOptions, clipped_policy_loss
from rlhf_ray.algorithms.value_loss import clipped_value_loss
from rlhf_ray.data.minibatches import plan_update
from rlhf_ray.data.trajectory import TrajectoryBatch, take_rows
from rlhf_ray.models.heads import load_causal, load_scalar
from rlhf_ray.models.responses import ResponsePack
from rlhf_ray.models.role_models import CausalModel, ScalarModel

PROMPTS = [3, 9, 1, 14, 5, 5, 8, 2, 20, 4, 6, 7]
RESPONSES = [12, 3, 20, 1, 7, 7, 16, 2, 9, 30, 5, 11]
TOKENS, SAMPLES = sum(RESPONSES), len(RESPONSES)

Gradient = dict[str, torch.Tensor]
MicroBatches = Iterable[Sequence[int]]


@pytest.fixture(scope="module")
def batch(make_batch: Callable[..., TrajectoryBatch]) -> TrajectoryBatch:
    return make_batch(PROMPTS, RESPONSES)


def columns(count: int, seed: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(TOKENS, generator=random) for _ in range(count)]


def policy_gradient(
    model: CausalModel, batch: TrajectoryBatch, micro_batches: MicroBatches, mode: AggregationMode
) -> Gradient:
    """Accumulated over micro-batches; ratios lie on both sides of the clip."""
    noise, advantages = columns(2, seed=0)
    with torch.no_grad():
        whole = ResponsePack.of(batch, range(SAMPLES), torch.device("cpu"))
        old = model(whole.packed, whole.positions, whole.targets, 0.9)[0] + 0.3 * noise
    model.zero_grad()
    for samples in micro_batches:
        pack = ResponsePack.of(batch, samples, torch.device("cpu"))
        rows = torch.from_numpy(take_rows(batch.response_offsets, samples))
        logprobs, entropy = model(pack.packed, pack.positions, pack.targets, 0.9)
        inputs = PolicyLossInputs(logprobs, old[rows], advantages[rows], entropy)
        out = clipped_policy_loss(inputs, PolicyLossOptions(0.2, 0.2, dual_clip=3.0, entropy_coef=0.01))
        (out.loss * token_weights(pack.lengths, mode, TOKENS, SAMPLES)).sum().backward()
    return gradient_of(model)


def value_gradient(
    model: ScalarModel, batch: TrajectoryBatch, micro_batches: MicroBatches, mode: AggregationMode
) -> Gradient:
    """Accumulated over micro-batches; values lie on both sides of the clip."""
    old, returns = columns(2, seed=1)
    model.zero_grad()
    for samples in micro_batches:
        pack = ResponsePack.of(batch, samples, torch.device("cpu"))
        rows = torch.from_numpy(take_rows(batch.response_offsets, samples))
        out = clipped_value_loss(model(pack.packed, pack.positions), old[rows], returns[rows], 0.2)
        (out.loss * token_weights(pack.lengths, mode, TOKENS, SAMPLES)).sum().backward()
    return gradient_of(model)


def gradient_of(model: torch.nn.Module) -> Gradient:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ways_to_cut(batch: TrajectoryBatch) -> dict[str, list[list[int]]]:
    """The same optimizer step as micro-batches of several sizes, orders and numbers of ranks."""
    ways = {"each sample alone": [[sample] for sample in range(SAMPLES)]}
    for ranks in (1, 2, 3, 8):
        for max_tokens in (1, 40, 100):
            plans = plan_update(
                batch.prompt_lengths,
                batch.response_lengths,
                batch.action_lengths,
                epochs=1,
                optimizer_steps=1,
                dp_size=ranks,
                max_tokens=max_tokens,
                seed=0,
            )
            ways[f"{ranks} ranks, {max_tokens} tokens"] = [list(m) for [step] in plans for m in step.micro_batches]
    ways["shuffled"] = [part.tolist() for part in np.array_split(np.random.default_rng(0).permutation(SAMPLES), 3)]
    ways["with dummies"] = [[], list(range(SAMPLES)), []]
    return ways


def assert_same_for_every_cut(gradient: Callable[[list[list[int]]], Gradient], batch: TrajectoryBatch) -> None:
    wanted = gradient([list(range(SAMPLES))])
    assert any(bool(part.abs().max() > 1e-2) for part in wanted.values())
    for way, micro_batches in ways_to_cut(batch).items():
        found = gradient(micro_batches)
        assert found.keys() == wanted.keys()
        for name, part in found.items():
            difference = float((part - wanted[name]).abs().max())
            assert difference <= 1e-5, f"{way}: {name} differs by {difference}"


@pytest.mark.parametrize("mode", ["token", "sample"])
def test_the_policy_gradient_does_not_depend_on_the_cut(
    tiny_model_dir: Path, batch: TrajectoryBatch, mode: AggregationMode
) -> None:
    model = load_causal(str(tiny_model_dir), dtype=torch.float32, vocab_chunk_tokens=16)
    assert_same_for_every_cut(lambda cut: policy_gradient(model, batch, cut, mode), batch)


@pytest.mark.parametrize("mode", ["token", "sample"])
def test_the_value_gradient_does_not_depend_on_the_cut(
    tiny_model_dir: Path, batch: TrajectoryBatch, mode: AggregationMode
) -> None:
    model = load_scalar(str(tiny_model_dir), dtype=torch.float32)
    assert_same_for_every_cut(lambda cut: value_gradient(model, batch, cut, mode), batch)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_the_policy_gradient_does_not_depend_on_the_vocabulary_chunk(
    tiny_model_dir: Path, batch: TrajectoryBatch, chunk: int
) -> None:
    whole, other = (
        policy_gradient(
            load_causal(str(tiny_model_dir), dtype=torch.float32, vocab_chunk_tokens=tokens),
            batch,
            [range(SAMPLES)],
            "token",
        )
        for tokens in (64, chunk)
    )
    for name, part in whole.items():
        torch.testing.assert_close(other[name], part, rtol=0, atol=1e-5)


def test_a_response_pack_says_where_each_response_token_is_predicted(batch: TrajectoryBatch) -> None:
    samples = [4, 0, 3]
    pack = ResponsePack.of(batch, samples, torch.device("cpu"))
    ids = pack.packed.input_ids[0]
    assert pack.targets.tolist() == np.concatenate([batch.response(s) for s in samples]).tolist()
    assert ids[pack.positions + 1].tolist() == pack.targets.tolist()
    assert ids[pack.last].tolist() == [batch.response(s)[-1] for s in samples]
    assert pack.lengths.tolist() == [RESPONSES[s] for s in samples]
    starts = pack.packed.cu_seqlens[:-1].tolist()
    for start, sample in zip(starts, samples, strict=True):
        assert ids[start : start + PROMPTS[sample]].tolist() == batch.prompt(sample).tolist()
    assert pack.packed.position_ids[0, starts].tolist() == [0, 0, 0]
