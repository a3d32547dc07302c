"""Ranks that share packs compute what one rank computes, and their gradients add up to its gradient."""

import copy
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rlhf_ray.models.heads import load_causal, load_scalar
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.models.sequence_parallel import SequenceParallel, copies_of_keys
from rlhf_ray.models.tiny import build_tiny_model
from rlhf_ray.models.token_logprobs import Beside

Result = TypeVar("Result")
LENGTHS = (5, 1, 17, 9, 30, 2)
TOKENS = sum(LENGTHS)


class Ranks:
    """Ranks in threads of this process, each with a gloo group of its own."""

    def __init__(self, count: int) -> None:
        store = dist.HashStore()
        self._threads = ThreadPoolExecutor(count)
        groups = self._threads.map(lambda rank: _group(store, rank, count), range(count))
        self.places = [SequenceParallel(group, count, rank) for rank, group in enumerate(groups)]

    def run(self, function: Callable[[SequenceParallel], Result]) -> list[Result]:
        """What each rank makes of it, all at the same time."""
        return list(self._threads.map(function, self.places, timeout=60))


def _group(store: dist.Store, rank: int, count: int) -> dist.ProcessGroup:
    group = dist.ProcessGroup(store, rank, count)
    gloo, kind = dist.ProcessGroupGloo(store, rank, count, timedelta(seconds=30)), dist.ProcessGroup.BackendType.GLOO
    group._register_backend(torch.device("cpu"), kind, gloo)
    return group


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    return Ranks(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads over two of keys and values: more of these than two ranks need, fewer than four."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "model", hidden=128)


def pack(lengths: Sequence[int] = LENGTHS) -> PackedSequences:
    random = np.random.default_rng(0)
    return PackedSequences.of([random.integers(3, 512, n).astype(np.int32) for n in lengths], torch.device("cpu"))


def on_ranks(
    ranks: Ranks, model: Any, forward: Callable[[Any], Sequence[torch.Tensor]]
) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """What each rank's copy of the model gives, and the sum over ranks of the gradients of the same loss."""

    def one(place: SequenceParallel) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        own = copy.deepcopy(model)
        own.sequence_parallel = place
        return with_gradients(own, forward)

    outputs, gradients = zip(*ranks.run(one), strict=True)
    return list(outputs), [torch.stack(parts).sum(0) for parts in zip(*gradients, strict=True)]


def with_gradients(
    model: torch.nn.Module, forward: Callable[[Any], Sequence[torch.Tensor]]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs, and the gradient of a loss that is no sum over tokens."""
    outputs = list(forward(model))
    loss = torch.stack([out.square().mean() * out.sin().sum() for out in outputs if out.requires_grad]).sum()
    return [out.detach() for out in outputs], list(torch.autograd.grad(loss, list(model.parameters())))


def assert_as_one_rank(ranks: Ranks, model: Any, forward: Callable[[Any], Sequence[torch.Tensor]]) -> None:
    wanted, gradient = with_gradients(model, forward)
    outputs, gradients = on_ranks(ranks, model, forward)
    for found in outputs:
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        for mine, first in zip(found, outputs[0], strict=True):
            assert torch.equal(mine, first), "every rank has the same numbers, to the last bit"
    scale = max(float(part.abs().max()) for part in gradient)
    for mine, theirs in zip(gradients, gradient, strict=True):
        assert float((mine - theirs).abs().max()) <= 2e-6 * scale


@pytest.mark.parametrize("beside", ["entropy", "collision", "nothing"])
def test_log_probs_and_their_gradient(ranks: Ranks, folder: Path, beside: Beside) -> None:
    model = load_causal(str(folder), dtype=torch.float32, vocab_chunk_tokens=16)
    packed = pack()
    assert packed.input_ids.shape[1] % 2 == 0
    positions = torch.randperm(TOKENS - 1, generator=torch.Generator().manual_seed(1))[: TOKENS // 2]
    targets = packed.input_ids[0][positions + 1]
    assert_as_one_rank(ranks, model, lambda model: model(packed, positions, targets, 0.7, beside))


@pytest.mark.parametrize("lengths", [(1,), (3,), (4, 4, 5), (40,)], ids=str)
def test_packs_that_cannot_be_cut_evenly(ranks: Ranks, folder: Path, lengths: tuple[int, ...]) -> None:
    model = load_scalar(str(folder), dtype=torch.float32)
    packed = pack(lengths)
    assert_as_one_rank(ranks, model, lambda model: [model(packed, torch.arange(sum(lengths)))])


def test_a_dummy_without_positions(ranks: Ranks, folder: Path) -> None:
    model, nowhere = load_causal(str(folder), dtype=torch.float32, vocab_chunk_tokens=16), torch.empty(0).long()

    def run(place: SequenceParallel) -> float:
        own = copy.deepcopy(model)
        own.sequence_parallel = place
        loss = own(pack((1,)), nowhere, nowhere, 1.0)[0].sum()
        loss.backward()
        return float(loss.detach())

    assert set(ranks.run(run)) == {0.0}


def test_values_at_the_last_tokens(ranks: Ranks, folder: Path) -> None:
    model, packed = load_scalar(str(folder), dtype=torch.float32), pack()
    assert_as_one_rank(ranks, model, lambda model: [model(packed, packed.cu_seqlens[1:].long() - 1)])


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_prompt_that_answers_share(ranks: Ranks, folder: Path, recompute: bool) -> None:
    """Attention alone knows of it, and that sees whole sequences on every rank."""
    model = load_causal(str(folder), dtype=torch.float32, vocab_chunk_tokens=16)
    if recompute:
        model.train()
        model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    texts = [np.arange(3, 3 + n, dtype=np.int32) for n in (12, 5, 7, 9)]
    packed = PackedSequences.of(texts, torch.device("cpu"), prefixes=[(0, 0), (0, 6), (0, 0), (17, 4)])
    positions = torch.tensor([5, *range(12, 16), 20, *range(24, 32)])
    assert_as_one_rank(ranks, model, lambda model: model(packed, positions, positions + 7, 1.0))


def test_each_rank_keeps_its_share_of_the_activations(ranks: Ranks, folder: Path) -> None:
    model, packed = load_scalar(str(folder), dtype=torch.float32), pack((1500, 500, 48))

    def kept(place: SequenceParallel | None) -> int:
        """Bytes that a forward pass keeps for the backward pass, weights aside."""
        own = copy.deepcopy(model)
        own.sequence_parallel = place
        weights = {parameter.data_ptr() for parameter in own.parameters()}
        found: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            scores = own(packed, packed.cu_seqlens[1:].long() - 1)
        assert scores.requires_grad  # what it keeps lives until here
        return sum(found.values())

    alone = kept(None)
    count = len(ranks.places)
    for mine in ranks.run(kept):
        assert alone / count < mine < 1.2 * alone / count


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "copies"),
    [(8, 8, 2, 1), (8, 2, 2, 1), (8, 2, 4, 2), (8, 1, 8, 8), (9, 3, 3, 1), (9, 3, 9, 3)],
)
def test_heads_that_can_be_dealt(heads: int, kv_heads: int, ranks: int, copies: int) -> None:
    assert copies_of_keys(heads, kv_heads, ranks) == copies


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "message"),
    [
        (9, 3, 2, "9 attention heads and 3 key/value heads can't be dealt evenly to 2 ranks, but to 3, 9"),
        (12, 3, 2, "12 attention heads and 3 key/value heads can't be dealt evenly to 2 ranks, but to 3, 6, 12"),
        (1, 1, 2, "1 attention heads and 1 key/value heads can't be dealt evenly to 2 ranks"),
    ],
)
def test_heads_that_cannot_be_dealt(heads: int, kv_heads: int, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        copies_of_keys(heads, kv_heads, ranks)
