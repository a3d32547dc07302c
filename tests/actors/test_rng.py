import random
from pathlib import Path

import numpy as np
import torch

from rlhf_ray.actors.worker import load_rng, save_rng, seed_everything


def draw() -> list[float]:
    """One number of each generator, with both halves of a pair of normals, which they keep in turn."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_every_generator_goes_on_from_the_saved_state(tmp_path: Path) -> None:
    seed_everything(5, deterministic=False)
    draw()
    save_rng(tmp_path / "rng.pt")
    wanted = [draw() for _ in range(3)]
    seed_everything(6, deterministic=False)
    draw()
    load_rng(tmp_path / "rng.pt")
    assert [draw() for _ in range(3)] == wanted


def test_the_same_seed_gives_the_same_numbers_and_another_gives_others() -> None:
    drawn = []
    for seed in (2**63 - 1, 2**63 - 1, 3):
        seed_everything(seed, deterministic=False)
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


def test_a_deterministic_process_refuses_other_kernels() -> None:
    try:
        seed_everything(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
