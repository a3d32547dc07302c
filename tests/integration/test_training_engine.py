"""One rank or two, any ZeRO stage, any micro-batches: the training of a plain torch loop."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_ray.actors.waiting import TaskFailed
from rlhf_ray.config.roles import Level
from rlhf_ray.config.training import Lora, TrainingEngine
from rlhf_ray.engines.training import lr_factor
from rlhf_ray.models.heads import load_causal
from rlhf_ray.models.weights import model_weights
from training_rank import (
    LORA_SEED,
    OPTIMIZER,
    SEQUENCES,
    TOTAL_STEPS,
    Ranks,
    Trained,
    TrainingRank,
    Weights,
    run,
    run_each,
    started,
    token_mean_loss,
)

ALL = list(range(len(SEQUENCES)))
CLIP = 0.5
LORA = Lora(rank=8, alpha=64.0)


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    """A group of one rank and one of two."""
    with started(1, 2) as made:
        yield made


def trained(
    group: Ranks,
    model: Path,
    micro_batches: list[list[list[int]]],
    lora: Lora | None = None,
    moves: Sequence[Level] = (),
    **engine: object,
) -> Trained:
    """Two steps; `micro_batches` are per rank. All ranks must hold the same weights in the end."""
    run(group, TrainingRank.build, str(model), TrainingEngine(gradient_clip=CLIP, **engine), lora)  # type: ignore[arg-type]
    done: list[Trained] = run_each(group, TrainingRank.train, [(2, mine, moves) for mine in micro_batches])
    for other in done[1:]:
        assert_close(other.weights, done[0].weights, 0)
        assert other.norms == done[0].norms
    return done[0]


@pytest.fixture(scope="module")
def plain(wide_model: Path) -> Trained:
    """The same two steps in plain torch."""
    return plain_torch(wide_model)


@pytest.fixture(scope="module")
def plain_lora(wide_model: Path) -> Trained:
    """The same with adapters."""
    return plain_torch(wide_model, LORA)


def plain_torch(folder: Path, lora: Lora | None = None) -> Trained:
    torch.manual_seed(LORA_SEED)
    model = load_causal(str(folder), dtype=torch.float32, vocab_chunk_tokens=16, lora=lora)
    learnt = {name: parameter for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    adam = torch.optim.AdamW(
        learnt.values(),
        lr=OPTIMIZER.lr,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lr_factor(OPTIMIZER, TOTAL_STEPS))
    found = Trained()
    for _ in range(2):
        adam.zero_grad()
        token_mean_loss(model, ALL).backward()
        found.gradients.append({name: p.grad.numpy().copy() for name, p in learnt.items()})  # type: ignore[union-attr]
        found.norms.append(float(torch.nn.utils.clip_grad_norm_(learnt.values(), CLIP)))
        found.rates.append(schedule.get_last_lr()[0])
        adam.step()
        schedule.step()
    found.weights = {weight.name: weight.value().numpy().copy() for weight in model_weights(model)}
    return found


def assert_close(mine: Weights, wanted: Weights, tolerance: float) -> None:
    assert mine.keys() == wanted.keys()
    for name, tensor in mine.items():
        assert tensor.shape == wanted[name].shape, name
        difference = float(np.abs(tensor - wanted[name]).max())
        assert difference <= tolerance, f"{name} differs by {difference}"


def assert_same_training(mine: Trained, wanted: Trained) -> None:
    for gradient, theirs in zip(mine.gradients, wanted.gradients, strict=True):
        assert_close(gradient, theirs, 1e-5)
    assert mine.norms == pytest.approx(wanted.norms, rel=1e-4)
    assert mine.rates == pytest.approx(wanted.rates)
    assert_close(mine.weights, wanted.weights, 1e-5)


def test_the_plain_loop_clips_and_warms_up(plain: Trained) -> None:
    """Else the comparisons below would say nothing about it."""
    assert min(plain.norms) > CLIP
    assert plain.rates == [OPTIMIZER.lr / 2, OPTIMIZER.lr]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_trains_as_plain_torch_does(
    groups: dict[int, Ranks], wide_model: Path, plain: Trained, stage: int
) -> None:
    cut = [[[0, 3, 4], [1, 2, 5, 6, 7]]]
    assert_same_training(trained(groups[1], wide_model, cut, zero_stage=stage, dtype="float32"), plain)


@pytest.mark.parametrize(
    ("stage", "cut"),
    [
        (2, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]),
        (3, [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]),
        (3, [[[7], [2, 0], [4, 5]], [[6, 1], [3], []]]),
    ],
    ids=["stage 2", "stage 3", "stage 3, split otherwise, with a dummy"],
)
def test_two_ranks_train_as_one_does(
    groups: dict[int, Ranks], wide_model: Path, plain: Trained, stage: int, cut: list[list[list[int]]]
) -> None:
    assert_same_training(trained(groups[2], wide_model, cut, zero_stage=stage, dtype="float32"), plain)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_that_share_sequences_train_as_one_does(
    groups: dict[int, Ranks], wide_model: Path, plain: Trained, stage: int
) -> None:
    both = [[7], [2, 0, 1], [4, 5, 6, 3], []]
    found = trained(groups[2], wide_model, [both] * 2, zero_stage=stage, dtype="float32", sequence_parallel=2)
    assert_same_training(found, plain)


def test_ranks_that_share_a_long_sequence_need_about_half_the_memory(
    groups: dict[int, Ranks], wide_model: Path
) -> None:
    peaks = {}
    for ranks, group in groups.items():
        run(group, TrainingRank.build, str(wide_model), TrainingEngine(dtype="float32", sequence_parallel=ranks))
        peaks[ranks] = run(group, TrainingRank.peak_memory, 4096)
    assert max(peaks[2]) < 0.6 * peaks[1][0]


def test_adapters_and_recomputed_activations_go_with_shared_sequences(
    groups: dict[int, Ranks], wide_model: Path, plain_lora: Trained
) -> None:
    engine = {"zero_stage": 3, "dtype": "float32", "sequence_parallel": 2, "activation_checkpointing": True}
    assert_same_training(trained(groups[2], wide_model, [[ALL]] * 2, LORA, **engine), plain_lora)


def test_four_ranks_share_sequences_in_pairs(wide_model: Path, plain: Trained) -> None:
    first, second = [[7], [2, 0], [4, 5]], [[6, 1], [3], []]
    with started(4) as four:
        found = trained(
            four[4], wide_model, [first, first, second, second], zero_stage=2, dtype="float32", sequence_parallel=2
        )
    assert_same_training(found, plain)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 1), (2, 2), (2, 3)])
def test_adapters_train_as_plain_torch_trains_them(
    groups: dict[int, Ranks], wide_model: Path, plain_lora: Trained, ranks: int, stage: int
) -> None:
    cut = [[[7], [2, 0], [4, 5]], [[6, 1], [3], []]] if ranks == 2 else [[ALL]]
    found = trained(groups[ranks], wide_model, cut, LORA, zero_stage=stage, dtype="float32")
    assert_same_training(found, plain_lora)


def test_adapters_move_the_weights_that_they_change_and_no_others(plain_lora: Trained, wide_model: Path) -> None:
    initial = load_causal(str(wide_model), dtype=torch.float32, vocab_chunk_tokens=16).model
    moved = {
        name for name, p in initial.named_parameters() if np.abs(plain_lora.weights[name] - p.detach().numpy()).max()
    }
    assert moved == {name for name in plain_lora.weights if name.endswith("_proj.weight")}


def test_recomputed_activations_do_not_change_the_training(
    groups: dict[int, Ranks], wide_model: Path, plain: Trained
) -> None:
    found = trained(groups[1], wide_model, [[ALL]], zero_stage=2, dtype="float32", activation_checkpointing=True)
    assert_same_training(found, plain)


def test_parameters_kept_in_host_memory_do_not_change_the_training(
    groups: dict[int, Ranks], wide_model: Path, plain: Trained
) -> None:
    cut = [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    found = trained(groups[2], wide_model, cut, zero_stage=3, dtype="float32", offload_parameters="cpu")
    assert_same_training(found, plain)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_in_host_memory_does_not_change_the_training(
    groups: dict[int, Ranks], wide_model: Path, plain: Trained, stage: int
) -> None:
    """With several micro-batches, whose offloaded gradients older DeepSpeed lost after the first (its issue 7967)."""
    cut = [[[7], [2, 0], [4, 5]], [[6, 1], [3], []]]
    found = trained(groups[2], wide_model, cut, zero_stage=stage, dtype="float32", offload_optimizer="cpu")
    assert_same_training(found, plain)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_trains_roughly_as_float32_does(
    groups: dict[int, Ranks], wide_model: Path, plain: Trained, stage: int
) -> None:
    found = trained(groups[1], wide_model, [[ALL]], zero_stage=stage, dtype="bfloat16")
    assert found.norms == pytest.approx(plain.norms, rel=0.05)
    assert found.rates == pytest.approx(plain.rates)
    initial = load_causal(str(wide_model), dtype=torch.float32, vocab_chunk_tokens=16).model
    moved, theirs = (
        np.concatenate([(weights[name] - p.detach().numpy()).ravel() for name, p in initial.named_parameters()])
        for weights in (found.weights, plain.weights)
    )
    # Rounding hides small moves of large weights, but the direction of the whole step is the same.
    assert float(moved @ theirs / np.linalg.norm(moved) / np.linalg.norm(theirs)) > 0.95
    assert np.linalg.norm(moved) == pytest.approx(np.linalg.norm(theirs), rel=0.1)


@pytest.mark.parametrize("bucket_bytes", [1, 20_000, 2**30])
def test_full_weights_are_whole_on_every_rank_of_zero_3(
    groups: dict[int, Ranks], wide_model: Path, bucket_bytes: int
) -> None:
    run(groups[2], TrainingRank.build, str(wide_model), TrainingEngine(zero_stage=3, dtype="float32"))
    assert run(groups[2], TrainingRank.is_sharded) == [True, True]
    saved = load_causal(str(wide_model), dtype=torch.float32, vocab_chunk_tokens=16).model
    wanted = {name: parameter.detach().numpy() for name, parameter in saved.named_parameters()}
    for weights in run(groups[2], TrainingRank.weights, bucket_bytes):
        assert_close(weights, wanted, 0)
    assert run(groups[2], TrainingRank.is_sharded) == [True, True]


@pytest.mark.parametrize(
    ("ranks", "stage", "dtype", "lora"),
    [
        (1, 0, "float32", None),
        (1, 2, "float32", None),
        (1, 0, "bfloat16", None),
        (1, 2, "bfloat16", None),
        (2, 2, "bfloat16", None),
        (2, 3, "float32", None),
        (1, 0, "bfloat16", LORA),
        (2, 2, "bfloat16", LORA),
        (2, 3, "float32", LORA),
    ],
)
def test_a_loaded_checkpoint_goes_on_bit_for_bit(
    groups: dict[int, Ranks],
    wide_model: Path,
    tmp_path: Path,
    ranks: int,
    stage: int,
    dtype: str,
    lora: Lora | None,
) -> None:
    group, config = groups[ranks], TrainingEngine(zero_stage=stage, dtype=dtype, gradient_clip=CLIP)  # type: ignore[arg-type]
    cut = [[ALL[rank::ranks]] for rank in range(ranks)]

    def train(steps: int) -> Trained:
        done: list[Trained] = run_each(group, TrainingRank.train, [(steps, mine) for mine in cut])
        return done[0]

    run(group, TrainingRank.build, str(wide_model), config, lora)
    before = train(2)
    run(group, TrainingRank.save, str(tmp_path / "checkpoint"))
    undisturbed = train(2)
    run(group, TrainingRank.build, str(wide_model), config, lora)
    run(group, TrainingRank.load, str(tmp_path / "checkpoint"))
    assert_close(run(group, TrainingRank.weights)[0], before.weights, 0)
    resumed = train(2)
    assert resumed.rates == undisturbed.rates
    assert resumed.norms == undisturbed.norms
    assert_close(resumed.weights, undisturbed.weights, 0)
    for mine, theirs in zip(resumed.gradients, undisturbed.gradients, strict=True):
        assert_close(mine, theirs, 0)


def test_a_folder_without_checkpoint_is_an_error(groups: dict[int, Ranks], wide_model: Path, tmp_path: Path) -> None:
    run(groups[1], TrainingRank.build, str(wide_model), TrainingEngine(zero_stage=2, dtype="float32"))
    with pytest.raises(TaskFailed, match="FileNotFoundError: .* holds no DeepSpeed checkpoint"):
        run(groups[1], TrainingRank.load, str(tmp_path))


@pytest.mark.parametrize(
    ("stage", "dtype", "offload", "lora"),
    [
        (1, "bfloat16", "none", None),
        (2, "float32", "none", None),
        (2, "bfloat16", "cpu", None),
        (3, "bfloat16", "none", None),
        (3, "float32", "none", None),
        (3, "float32", "cpu", None),
        (1, "bfloat16", "none", LORA),
        (2, "bfloat16", "cpu", LORA),
        (3, "bfloat16", "none", LORA),
        (3, "float32", "cpu", LORA),
    ],
)
def test_an_engine_that_left_its_device_goes_on_as_if_it_had_stayed(
    groups: dict[int, Ranks], wide_model: Path, stage: int, dtype: str, offload: str, lora: Lora | None
) -> None:
    halves = [[ALL[:4]], [ALL[4:]]]
    engine = {"zero_stage": stage, "dtype": dtype, "offload_optimizer": offload}
    stayed = trained(groups[2], wide_model, halves, lora, **engine)
    phases = [Level.OUT, Level.WEIGHTS, Level.OUT, Level.WEIGHTS, Level.FULL]
    moved = trained(groups[2], wide_model, halves, lora, moves=phases, **engine)
    assert moved.norms == stayed.norms
    assert_close(moved.weights, stayed.weights, 0)


@pytest.mark.parametrize(
    ("ranks", "stage", "dtype", "lora"),
    [(1, 2, "bfloat16", LORA), (2, 1, "float32", LORA), (1, 3, "float32", LORA), (2, 3, "bfloat16", None)],
)
def test_nothing_holds_what_has_left_the_device(
    groups: dict[int, Ranks], wide_model: Path, ranks: int, stage: int, dtype: str, lora: Lora | None
) -> None:
    trained(
        groups[ranks], wide_model, [[ALL[rank::ranks]] for rank in range(ranks)], lora, zero_stage=stage, dtype=dtype
    )
    for found in run(groups[ranks], TrainingRank.left_behind):
        assert {name for name, (_, size) in found.items() if size} == (
            ({"frozen"} if lora else set()) | ({"shards", "optimizer"} if stage == 3 else set())
        )
        assert {name: left for name, (left, _) in found.items()} == dict.fromkeys(found, 0)


def test_an_engine_that_has_left_does_not_work(groups: dict[int, Ranks], wide_model: Path) -> None:
    run(groups[1], TrainingRank.build, str(wide_model), TrainingEngine(zero_stage=2, dtype="float32"))
    [[forward, backward, step]] = run(groups[1], TrainingRank.try_to_work, Level.WEIGHTS)
    assert forward == ""
    assert backward.startswith("a backward pass needs full on the device, but the model has left it as far as weights")
    assert step.startswith("an optimizer step needs full")
    [[forward, *_]] = run(groups[1], TrainingRank.try_to_work, Level.OUT)
    assert forward.startswith("a forward pass needs weights on the device")
