"""Two ranks that read their own parts of a model hold, score with and train the model that each would have loaded."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_ray.actors.waiting import TaskFailed
from rlhf_ray.config.training import Lora, ScoringEngine, TrainingEngine
from training_rank import SEQUENCES, Ranks, Trained, TrainingRank, load, outputs, run, run_each, started

ALL = list(range(len(SEQUENCES)))
LORA = Lora(rank=8, alpha=64.0)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Two of them."""
    with started(2) as made:
        yield made[2]


@pytest.fixture(scope="module")
def folders(wide_model: Path, as_reward_model: Callable[[Path], Path]) -> dict[str, Path]:
    """A causal model with a tied head, and a reward model."""
    return {"causal": wide_model, "trained head": as_reward_model(wide_model), "new head": wide_model}


def trained(ranks: Ranks, model: Path, config: TrainingEngine, *how: object) -> Trained:
    run(ranks, TrainingRank.build, str(model), config, *how)
    done: list[Trained] = run_each(ranks, TrainingRank.train, [(2, [[0, 1], [2]]), (2, [[3], [4, 5]])])
    return done[0]


@pytest.mark.parametrize("kind", ["causal", "trained head", "new head"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapters"])
@pytest.mark.parametrize(("dtype", "offload"), [("float32", "none"), ("bfloat16", "cpu")])
def test_training_from_parts_is_bit_for_bit_that_from_whole_models(
    ranks: Ranks, folders: dict[str, Path], kind: str, lora: Lora | None, dtype: str, offload: str
) -> None:
    config = TrainingEngine(zero_stage=3, dtype=dtype, offload_parameters=offload)  # type: ignore[arg-type]
    mine, theirs = (trained(ranks, folders[kind], config, lora, kind != "causal", sharded) for sharded in (True, False))
    assert mine.norms == theirs.norms
    assert mine.weights.keys() == theirs.weights.keys()
    for name, weight in mine.weights.items():
        assert np.array_equal(weight, theirs.weights[name]), name


@pytest.mark.parametrize("kind", ["causal", "trained head", "new head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_from_parts_are_those_of_the_whole_model(
    ranks: Ranks, folders: dict[str, Path], kind: str, dtype: str
) -> None:
    config = ScoringEngine(zero_stage=3, dtype=dtype)  # type: ignore[arg-type]
    scalar = kind != "causal"
    mine, theirs = (
        run(ranks, TrainingRank.score, str(folders[kind]), config, scalar, sharded) for sharded in (True, False)
    )
    assert np.array_equal(mine[0], mine[1])
    assert np.array_equal(mine[0], theirs[0])
    whole = load(str(folders[kind]), getattr(torch, dtype), scalar=scalar)
    with torch.no_grad():
        plain = outputs(whole, ALL, scalar=scalar).float().numpy()
    np.testing.assert_allclose(mine[0], plain, atol=1e-5 if dtype == "float32" else 0.05)


def test_a_rank_never_holds_more_than_its_part_and_one_parameter(ranks: Ranks, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    size = 4 * model.num_parameters()
    largest = 4 * max(parameter.numel() for parameter in model.parameters())
    assert size > 95 * 2**20
    run(
        ranks, TrainingRank.loading_growth, str(tmp_path), True
    )  # what stays after the first model is no part of a model
    for grown in run(ranks, TrainingRank.loading_growth, str(tmp_path), True):
        assert grown < size / 2 + largest + 10 * 2**20
    for grown in run(ranks, TrainingRank.loading_growth, str(tmp_path), False):
        assert grown > size


def test_numbers_that_are_none_are_named_with_tensor_and_file(ranks: Ranks, wide_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(wide_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)  # in the parts of both ranks, so that neither waits for the other
    save_file(weights, folder / "model.safetensors")
    said = f"model.norm.weight in {folder}/model.safetensors holds NaN or infinity"
    with pytest.raises(TaskFailed, match=re.escape(said)):
        run(ranks, TrainingRank.build, str(folder), TrainingEngine(zero_stage=3, dtype="float32"))


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapters"])
@pytest.mark.parametrize("file_bytes", [10**9, 10**6], ids=["one file", "several files"])
def test_an_export_in_parts_is_the_model(
    ranks: Ranks, folders: dict[str, Path], tmp_path: Path, lora: Lora | None, file_bytes: int
) -> None:
    done = trained(ranks, folders["causal"], TrainingEngine(zero_stage=3, dtype="float32"), lora)
    run(ranks, TrainingRank.export, str(tmp_path / "export"), file_bytes)
    assert (tmp_path / "export/model.safetensors.index.json").exists() == (file_bytes == 10**6)
    assert (tmp_path / "export/model.safetensors").exists() == (file_bytes == 10**9)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    weights = dict(loaded.named_parameters())
    assert weights.keys() == done.weights.keys()
    for name, weight in weights.items():
        assert np.array_equal(weight.detach().numpy(), done.weights[name]), name
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
