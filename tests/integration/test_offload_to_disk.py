"""What is kept on a disk trains as what is kept in memory, and its checkpoints are the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ray.config.roles import Level
from rlhf_ray.config.training import Lora, ScoringEngine, TrainingEngine
from rlhf_ray.engines.saved_weights import saved_weights
from training_rank import Ranks, Trained, TrainingRank, run, run_each, started

pytestmark = pytest.mark.long  # DeepSpeed compiles its disk operator: 3 minutes

MICRO_BATCHES = [[[0, 1], [2]], [[3], [4, 5]]]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Two of them, where DeepSpeed can offload to a disk."""
    if not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed needs libaio with its headers to offload to a disk (apt-get install libaio-dev)")
    with started(2) as made:
        yield made[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough: DeepSpeed keeps shares of less than 1 MiB in memory."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1408, num_hidden_layers=2, num_attention_heads=8
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def engine(optimizer: str, parameters: str, dtype: str, disk: Path) -> TrainingEngine:
    settings: dict[str, Any] = {"offload_optimizer": optimizer, "offload_parameters": parameters, "dtype": dtype}
    if "nvme" in (optimizer, parameters):
        settings["nvme_path"] = str(disk)
    return TrainingEngine(zero_stage=3, gradient_clip=0.5, **settings)


def train(ranks: Ranks, steps: int, moves: tuple[Level, ...] = ()) -> Trained:
    done: list[Trained] = run_each(ranks, TrainingRank.train, [(steps, mine, moves) for mine in MICRO_BATCHES])
    return done[0]


def assert_equal(mine: Trained, theirs: Trained) -> None:
    assert mine.norms == theirs.norms
    assert mine.rates == theirs.rates
    assert mine.weights.keys() == theirs.weights.keys()
    for name, weight in mine.weights.items():
        assert np.array_equal(weight, theirs.weights[name]), name


@pytest.mark.parametrize(
    ("optimizer", "parameters", "dtype", "lora"),
    [
        ("nvme", "none", "bfloat16", None),
        ("nvme", "nvme", "float32", None),
        ("cpu", "nvme", "float32", None),
        ("nvme", "nvme", "float32", Lora(rank=256)),
    ],
)
def test_offload_to_a_disk_does_not_change_the_training(
    ranks: Ranks,
    model: Path,
    tmp_path: Path,
    optimizer: str,
    parameters: str,
    dtype: str,
    lora: Lora | None,
) -> None:
    found = []
    for places in (("cpu", "none"), (optimizer, parameters)):  # files go when their engine does: last, so that it lives
        run(ranks, TrainingRank.build, str(model), engine(*places, dtype, tmp_path), lora)
        found.append(train(ranks, 2))
    assert_equal(*found)
    written = {path.name for path in tmp_path.rglob("*.swp")}
    assert any("exp_avg" in name for name in written) == (optimizer == "nvme")
    assert any("_param." in name for name in written) == (parameters == "nvme")


def test_an_engine_with_its_optimizer_on_a_disk_leaves_its_device_and_goes_on(
    ranks: Ranks, model: Path, tmp_path: Path
) -> None:
    found = []
    for moves in ((), (Level.OUT, Level.WEIGHTS, Level.OUT, Level.FULL)):
        run(ranks, TrainingRank.build, str(model), engine("nvme", "none", "float32", tmp_path))
        found.append(train(ranks, 2, moves))
    assert_equal(*found)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("nvme", "nvme"), ("nvme", "nvme")),
        (("nvme", "none"), ("cpu", "nvme")),
        (("cpu", "cpu"), ("nvme", "none")),
    ],
    ids=["on the disk", "from the disk to memory", "from memory to the disk"],
)
@pytest.mark.parametrize("dtype", ["float32"])
def test_a_checkpoint_is_the_same_wherever_states_are_kept(
    ranks: Ranks, model: Path, tmp_path: Path, before: tuple[str, str], after: tuple[str, str], dtype: str
) -> None:
    run(ranks, TrainingRank.build, str(model), engine(*before, dtype, tmp_path / "disk"))
    saved = train(ranks, 2)
    run(ranks, TrainingRank.save, str(tmp_path / "checkpoint"))
    undisturbed = train(ranks, 2)
    run(ranks, TrainingRank.build, str(model), engine(*after, dtype, tmp_path / "disk"))
    run(ranks, TrainingRank.load, str(tmp_path / "checkpoint"))
    resumed = train(ranks, 2)
    assert_equal(resumed, undisturbed)
    exported = saved_weights(tmp_path / "checkpoint", torch.float32)
    for name, weight in saved.weights.items():
        assert np.array_equal(exported[name].numpy(), weight), name
    assert not list((tmp_path / "checkpoint").rglob("*.swp"))


def test_weights_on_a_disk_score_as_those_in_memory(ranks: Ranks, model: Path, tmp_path: Path) -> None:
    on_disk = ScoringEngine(zero_stage=3, dtype="float32", offload_parameters="nvme", nvme_path=str(tmp_path))
    in_memory = ScoringEngine(zero_stage=3, dtype="float32")
    mine, theirs = (run(ranks, TrainingRank.score, str(model), config, False, True) for config in (on_disk, in_memory))
    assert np.array_equal(mine[0], theirs[0])
