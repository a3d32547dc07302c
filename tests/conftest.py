"""Fixtures that several folders of tests share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_ray.data.prepare import prepare
from rlhf_ray.data.trajectory import Trajectory, TrajectoryBatch
from rlhf_ray.models.heads import load_scalar
from rlhf_ray.models.tiny import build_tiny_model

MakeBatch = Callable[..., TrajectoryBatch]


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with its tokenizer and chat template."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def as_reward_model() -> Callable[[Path], Path]:
    """Gives a causal model a scalar head and writes the result beside it."""

    def make(causal: Path) -> Path:
        folder = causal.with_name(f"{causal.name}-reward")
        if not folder.exists():
            load_scalar(str(causal), dtype=torch.float32).model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(causal).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, as_reward_model: Callable[[Path], Path]) -> Path:
    """Folder with the models and data of the tiny examples, and a tiny reward model."""
    target = tmp_path_factory.mktemp("prepared")
    prepare(target, only={"tiny"})
    as_reward_model(target / "models/tiny")
    return target


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerFast:
    """The tiny model's tokenizer. Tests that change it work on a deep copy."""
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session")
def make_batch() -> MakeBatch:
    """Makes a batch of random trajectories from the lengths of their prompts and responses."""

    def make(
        prompt_lengths: list[int], response_lengths: list[int], vocab: int = 512, seed: int = 0
    ) -> TrajectoryBatch:
        random = np.random.default_rng(seed)
        return TrajectoryBatch.of(
            [
                Trajectory(
                    uid=f"p{number}",
                    sample_index=0,
                    seed=number,
                    prompt_tokens=random.integers(3, vocab, prompt).tolist(),
                    response_tokens=random.integers(3, vocab, response).tolist(),
                    engine_logprobs=(-random.random(response)).tolist(),
                    weight_versions=[0] * response,
                    finish_reason="stop",
                )
                for number, (prompt, response) in enumerate(zip(prompt_lengths, response_lengths, strict=True))
            ]
        )

    return make
